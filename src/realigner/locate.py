"""Find a host's decoder layers and, in each, the site: the branch whose output the delta is added to.

Names lie (``post_attention_layernorm`` means two opposite things in Llama and Gemma2), so the site is found from numbers and
proven before anything is added: see `probe`. A layer is sequential (a later module reads the post-attention residual, and all
that follows does), parallel (GPT-NeoX, Phi: the layer's own MLP does not see the delta) or single (Mamba: one branch only).
Hybrids have layers of several kinds, so each layer is resolved on its own. A host that fails is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import nn

import realigner.probe as probe
from realigner.errors import RealignerError
from realigner.hosts import text_config
from realigner.sites import HostSites, Site

_TRIES = 6  # candidates of a layer that are put to the proof
_NOTHING = "has no post-attention residual the probe can prove"


def find_layers(host: nn.Module, path: str | None = None) -> tuple[nn.Module, nn.ModuleList, str]:
    """The text decoder, its layers and their path within the host.

    Raises:
        RealignerError: when no ModuleList of the configured number of layers is there; name it with `path`.
    """
    count = _layer_count(host)
    get_decoder = getattr(host, "get_decoder", None)
    decoder: nn.Module = get_decoder() if callable(get_decoder) else host
    if path is not None:
        try:
            layers = host.get_submodule(path)
        except AttributeError:
            raise RealignerError(f"layers_path: the host has no module {path!r}") from None
        if not isinstance(layers, nn.ModuleList) or len(layers) != count:
            raise RealignerError(f"layers_path: {path!r} is not a list of the host's {count} layers")
        return decoder, layers, path
    for root in (decoder, host):  # a few types give their head, not their decoder, when asked
        lists = [
            (-name.count("."), sum(p.numel() for p in module.parameters()), name, module)
            for name, module in root.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == count
        ]
        if lists:
            break
    else:
        raise RealignerError(f"{type(host).__name__}: found no list of {count} decoder layers; name it with layers_path")
    # The outermost one (the layers of a vision tower lie deeper), then the largest, if one is.
    lists.sort(key=lambda entry: entry[:2])
    depth, size, name, module = lists[-1]
    rivals = [other for other_depth, other_size, other, _ in lists if other_depth == depth and 2 * other_size > size]
    if len(rivals) > 1:
        several = ", ".join(sorted(rivals))
        raise RealignerError(f"{type(host).__name__}: several lists of {count} layers ({several}); name one with layers_path")
    if root is not decoder:
        decoder = host.get_submodule(name.rpartition(".")[0])
    return decoder, module, next(name for name, found in host.named_modules() if found is module)


def _layer_count(host: nn.Module) -> int:
    config = text_config(host)
    # Decoders of encoder-decoder families count the encoder's layers in num_hidden_layers.
    names = ("decoder_layers", "num_decoder_layers", "num_hidden_layers")
    count = next((count for name in names if (count := getattr(config, name, None)) is not None), None)
    if count is None:
        raise RealignerError(f"{type(host).__name__}: its config has none of {', '.join(names)}, so its layers cannot be told")
    return int(count)


def find_sites(host: nn.Module, path: str | None = None) -> HostSites:
    """Probe a host and prove the site of every layer: four short forwards, once for a host; it is left as it was.

    Args:
        host: a transformers causal language model.
        path: where its decoder layers are, when `find_layers` cannot tell.

    Raises:
        RealignerError: naming the layer and the reason, when a site cannot be proven. Such a host is refused.

    Example:
        >>> from realigner.tiny import tiny_host
        >>> find_sites(tiny_host("llama")).summary()["branch"]
        'self_attn'
    """
    decoder, layers, path = find_layers(host, path)
    parts = (part for layer in layers for part in (layer, *layer.children()))
    key = path, id(decoder), *map(id, parts), next(host.parameters()).dtype
    known, found = vars(host).get("irm_sites", (None, None))
    if known == key:
        return cast(HostSites, found)
    name = type(host).__name__
    with probe.as_in_evaluation(host), torch.no_grad():
        clean = _first_run(host, decoder, layers)
        for index, record in enumerate(clean):
            _refuse_odd(f"{name}: layer {index}", record)
        scales = probe.config_scales(host)
        ways = [probe.candidates(record, scales) for record in clean]
        findings = [_next(f"{name}: layer {index}", way, _NOTHING) for index, way in enumerate(ways)]
        reasons: dict[int, str] = {}  # of the first candidate of each layer that failed
        for _ in range(_TRIES):
            failures = _failures(host, decoder, layers, clean, findings)
            if not failures:
                break
            reasons = failures | reasons
            for index in failures:
                findings[index] = _next(f"{name}: layer {index}", ways[index], reasons[index])
        else:
            first = min(reasons)
            raise RealignerError(f"{name}: layer {first} {reasons[first]}; refused")
        random = probe.random_in_training(host, decoder, layers, clean)
    sites = tuple(replace(site, layer=index) for index, site in enumerate(findings))
    found = HostSites(decoder, layers, path, _width(clean), sites, random)
    vars(host)["irm_sites"] = key, found
    return found


def _first_run(host: nn.Module, decoder: nn.Module, layers: nn.ModuleList) -> list[probe.LayerRecord]:
    """One forward, as the host is; it can fail in any way where a config's values are of odd kinds.

    Raises:
        RealignerError: when the host cannot run.
    """
    try:
        return probe.run(host, decoder, layers)
    except (RealignerError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise RealignerError(
            f"{type(host).__name__}: the forward pass failed ({why}); does its config belong to these weights?"
        ) from error


def _next(where: str, ways: Iterator[Site], otherwise: str) -> Site:
    finding = next(ways, None)
    if finding is None:
        raise RealignerError(f"{where} {otherwise}; refused")
    return finding


def _failures(
    host: nn.Module, decoder: nn.Module, layers: nn.ModuleList, clean: list[probe.LayerRecord], found: list[Site]
) -> dict[int, str]:
    """Layer -> what is wrong with its finding, after two more forwards; empty when all are proven."""
    moved = probe.run(host, decoder, layers, probe.moved_edits(clean, found))
    compensated = probe.run(host, decoder, layers, probe.compensated_edits(clean, found))
    failures = {}
    owners: dict[int, int] = {}
    for index, finding in enumerate(found):
        first = owners.setdefault(id(layers[index].get_submodule(finding.branch)), index)
        if first != index:
            failures[index] = f"shares the module {finding.branch} with layer {first}"
        elif why := probe.failure(clean[index], moved[index], compensated[index], finding):
            failures[index] = f"has no site: {why}"
    return failures


def _refuse_odd(where: str, record: probe.LayerRecord) -> None:
    if record.times != 1:
        times = f"runs {record.times} times" if record.times else "does not run"
        raise RealignerError(f"{where} {times} in one forward of the decoder; refused")
    if record.x is None:
        raise RealignerError(f"{where} is given no tensor [batch, position, neuron] (it has several streams?); refused")
    if record.x.dim() != 3 or record.x.shape[0] != 1:
        shape = list(record.x.shape)
        raise RealignerError(
            f"{where}: its residual stream is {shape} for a batch of 1, not [batch, position, neuron]; refused"
        )


def _width(clean: list[probe.LayerRecord]) -> int:
    assert clean[0].x is not None  # _refuse_odd
    return clean[0].x.shape[-1]
