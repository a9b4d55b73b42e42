"""Commands on hosts and the machine: hosts, doctor."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from realigner.cli import options as opt
from realigner.console import show
from realigner.errors import RealignerError, UsageError
from realigner.files import Artifact, Output


def hosts(
    context: typer.Context,
    host: Annotated[Optional[str], typer.Argument(help="The host to verify; without it, every type in transformers.")] = None,
    types: Annotated[Optional[list[str]], typer.Option("--type", help="Only this model type; may be repeated.")] = None,
    out: Annotated[Optional[Path], typer.Option(help="Also write the table as a Markdown page (docs/hosts.md).")] = None,
    force: opt.Force = False,
    dtype: opt.Dtype = "float32",
    trust_remote_code: opt.Trust = False,
    as_json: opt.Json = False,
) -> None:
    """Verify injection numerically on a host; without one, on a tiny random model of every causal-LM type (a few minutes)."""
    if host is None:
        from realigner.files import taken

        place = None if out is None else context.with_resource(taken(out, PAGE, force))
        _census(types, place, as_json)
        return
    if types or out is not None:
        raise UsageError("hosts: --type and --out belong to the census; leave out the host")
    from realigner.census import EXACT, PROVEN, prove
    from realigner.fingerprints import fingerprint
    from realigner.hosts import load_host

    loaded, _ = load_host(host, dtype=dtype, trust_remote_code=trust_remote_code)
    entry, identity = prove(loaded), fingerprint(loaded)
    if as_json:
        opt.print_json({"host": identity.to_dict(), **entry.to_dict()})
    else:
        sizes = f"{identity.num_layers} layers, hidden {identity.hidden_size}, {loaded.dtype}"
        show(f"{identity.name}: {identity.architecture}, {sizes}")
        show(f"site:   {_site_line(entry.site)}" if entry.site else "site:   none")
        show(f"proof:  {entry.verdict}" + (f" ({entry.reason})" if entry.reason else ""))
        for name, error in entry.errors.items():
            show(f"        {_PROOFS[name]:<52} {'equal to the bit' if error == 0 else f'off by {error:.1e}'}")
        if entry.checkpointing not in ("", EXACT):
            show(f"        no gradient checkpointing: {entry.checkpointing}")
    if entry.verdict != PROVEN:
        raise typer.Exit(1)


_PROOFS = {
    "off": "strength 0, and detached, against the bare host",
    "all": "deltas at all layers, against the reference",
    "one": "deltas at one layer, against the reference",
    "h0": "what the IRM reads, against the residual",
    "cached": "cached generation, against the reference",
    "trained": "in training mode, against evaluation mode",
    "checkpointed": "gradients with checkpointing, against those without",
}


def _read_page(path: Path) -> None:
    """Raise unless a file is the page of a census."""
    from realigner.census import is_page

    if not is_page(path):
        raise RealignerError(f"{path}: not the page of a census")


PAGE = Artifact("the page of a census", _read_page)


def _census(types: list[str] | None, place: Output | None, as_json: bool) -> None:
    from transformers import __version__ as release

    from realigner.census import PROVEN, UNPROVEN, WRONG, census, page, totals
    from realigner.console import progress
    from realigner.tiny import MODEL_TYPES

    unknown = [name for name in types or [] if name not in MODEL_TYPES]
    if unknown:
        raise UsageError(f"--type: transformers {release} has no causal language model of type {unknown[0]!r}")
    entries = []
    # Some of transformers' models print; what they say is not part of our document.
    with redirect_stdout(sys.stderr), progress("proving", len(types or MODEL_TYPES), quiet=as_json) as task:
        for entry in census(types):
            entries.append(entry)
            task.advance(note=entry.model_type)
    if place is not None:
        place.write(page(entries, f"transformers {release}"))
    count = totals(entries)
    if as_json:
        opt.print_json({"transformers": release, "totals": count, "entries": [entry.to_dict() for entry in entries]})
    else:
        for entry in entries:
            what = _site_line(entry.site) if entry.verdict == PROVEN else entry.reason
            show(f"{entry.model_type:<26} {entry.verdict:<9}  {opt.short(what, 120)}")
        show(f"\n{len(entries)} types: " + ", ".join(f"{number} {verdict}" for verdict, number in count.items()))
        if place is not None:
            show(f"Page: {place.path}")
    if count[WRONG] or count[UNPROVEN]:
        raise typer.Exit(1)


def doctor(as_json: opt.Json = False) -> None:
    """Versions, device, embedded host, free disk, what each extra lacks: what to look at first when something is wrong."""
    import shutil

    import torch

    import realigner.hosts as h
    from realigner.extras import missing_packages, versions

    cache = h.cache_root()
    place = next(path for path in (cache, *cache.parents) if path.exists())
    converted = (cache / "hosts" / h.EMBEDDED / "config.json").is_file()
    wheel = h.embedded_gguf()
    device = h.resolve_device("auto")
    free = shutil.disk_usage(place).free / 2**30
    facts: dict[str, Any] = {
        **versions(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "dtype": str(h.resolve_dtype("auto", device)).removeprefix("torch."),
        "embedded_host": "converted" if converted else "wheel installed, converted on first use" if wheel else "missing",
        "cache": str(cache),
        "free_disk_gib": round(free, 1),
    }
    problems = []
    if not converted and wheel is None:
        problems.append(f"the embedded host is missing; run: {h.EMBEDDED_INSTALL}")
    if free < 1.5:
        problems.append(f"only {free:.1f} GiB free at {place}; the embedded host needs 0.6, a run 0.1")
    extras = missing_packages()
    if as_json:
        opt.print_json({**facts, "missing": extras, "problems": problems})
    else:
        for key, value in facts.items():
            show(f"{key.replace('_', ' '):<14} {value}")
        for extra, missing in extras.items():
            needs = f'needs {", ".join(missing)}: pip install "realigner[{extra}]"' if missing else "installed"
            show(f"{f'[{extra}]':<14} {needs}")
    if problems:
        raise RealignerError("; ".join(problems))
    if not as_json:
        show("no problems found")


def _site_line(summary: dict[str, Any]) -> str:
    branch, kind, scale = (_several(summary[key]) for key in ("branch", "kind", "scale"))
    weight = "" if scale == "1" else f", x + {scale} * branch"
    return f"{summary['layers']}.*.{branch}, {kind}{weight}"


def _several(value: Any) -> str:
    """A value, or the distinct ones of a list that has one a layer."""
    values = value if isinstance(value, list) else [value]
    return "|".join(dict.fromkeys(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values))
