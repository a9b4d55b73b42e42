"""Edited hosts: the permuted one is the same function, the silenced channel is silent, and what is not exact is refused."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import realigner as ra
import realigner.explain.edits as edits
from realigner import probe
from realigner.errors import RealignerError, UsageError
from realigner.explain.edits import permuted, randomised, save_edited, with_column, with_gain, without_channel
from realigner.explain.roles import find_stream, roles_of
from realigner.locate import find_sites
from realigner.tiny import MODEL_TYPES, UNBUILDABLE, tiny_host
from tests.tiny import tiny_pair, tiny_tokenizer

SOME = (
    *(
        "llama",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "olmo",
        "olmo2",
        "qwen2",
        "qwen3",
        "mistral",
        "gpt_neox",
        "gptj",
        "opt",
    ),
    *("phi", "phi3", "falcon", "bloom", "mpt", "mixtral", "qwen3_moe", "starcoder2", "stablelm", "cohere", "granite", "mamba"),
    *("nemotron_h", "rwkv", "bert", "bart", "lfm2"),
)


def lively(host: Any, seed: int = 9) -> Any:
    """A host whose norms and biases are not all ones and zeros: those would not notice that they were left out."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in host.parameters():
        if parameter.is_floating_point() and bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return host


def order(size: int, seed: int = 3) -> list[int]:
    found: list[int] = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    return found


def logits(host: Any) -> torch.Tensor:
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        out: torch.Tensor = host(input_ids=ids, use_cache=False).logits
    return out


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


# --- permuted -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SOME)
def test_permuted_is_the_same_function(family: str) -> None:
    host = lively(tiny_host(family))
    other = permuted(host, order(32))
    assert off(logits(other), logits(host)) < 1e-5
    assert off(edits._logits(other, torch.float64), edits._logits(host, torch.float64)) < 1e-10
    moved = [name for name, p in other.named_parameters() if not torch.equal(p, host.get_parameter(name))]
    assert set(moved) == {name for name, _ in host.named_parameters()} & set(roles_of(host))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral", "bert"])
def test_the_identity_and_there_and_back(family: str) -> None:
    host = lively(tiny_host(family))
    state = {name: tensor.clone() for name, tensor in host.state_dict().items()}
    back = torch.argsort(torch.tensor(order(32))).tolist()
    for other in (permuted(host, range(32)), permuted(permuted(host, order(32)), back)):
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in state.items())
        assert torch.equal(logits(other), logits(host))
    assert all(torch.equal(tensor, host.state_dict()[name]) for name, tensor in state.items())


def test_which_way_it_goes() -> None:
    """Index i becomes permutation[i]."""
    host, new = lively(tiny_host("llama")), order(32)
    other = permuted(host, new)
    for i in range(32):
        assert other.model.norm.weight[new[i]] == host.model.norm.weight[i]
        assert torch.equal(other.model.layers[1].mlp.down_proj.weight[new[i]], host.model.layers[1].mlp.down_proj.weight[i])
        assert torch.equal(other.lm_head.weight[:, new[i]], host.lm_head.weight[:, i])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi", "granite", "mamba"])
def test_the_residual_at_every_site_is_permuted(family: str) -> None:
    """h0 among them: what the IRM reads."""
    host, new = lively(tiny_host(family)), torch.tensor(order(32))
    want, got = residuals(host), residuals(permuted(host, new.tolist()))
    for before, after in zip(want, got, strict=True):
        assert off(after[..., new], before) < 1e-5
        assert off(after, before) > 0.1


def residuals(host: Any) -> list[torch.Tensor]:
    found = find_sites(host)
    with probe.as_in_evaluation(host), torch.no_grad():
        records = probe.run(host, found.decoder, found.layers)
    return [
        sum((weight * r.output(name) for name, weight in s.base), s.scale * r.output(s.branch))
        for s, r in zip(found.sites, records, strict=True)
    ]


@pytest.mark.parametrize("tied", [True, False])
def test_tied_stays_tied(tied: bool) -> None:
    other = permuted(tiny_host("llama", tie_word_embeddings=tied), order(32))
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_permuted_in_other_precisions(dtype: torch.dtype) -> None:
    host = lively(tiny_host("llama")).to(dtype)
    other = permuted(host, order(32))
    assert other.dtype == dtype
    assert torch.equal(other.model.norm.weight[order(32)], host.model.norm.weight)


@pytest.mark.parametrize(
    "setting",
    [
        {"model_type": "falcon", "new_decoder_architecture": True},
        {"model_type": "falcon", "parallel_attn": False, "alibi": True},
        {"model_type": "bloom", "apply_residual_connection_post_layernorm": True},
        {"model_type": "gpt_neox", "use_parallel_residual": False},
        {"model_type": "opt", "do_layer_norm_before": False},
        {"model_type": "opt", "word_embed_proj_dim": 16},
        {"model_type": "cohere", "use_qk_norm": True},
        {"model_type": "gpt2", "num_hidden_layers": 6, "hidden_size": 64},
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    ],
    ids=str,
)
def test_variants_of_a_type(setting: dict[str, Any]) -> None:
    host = lively(tiny_host(**setting))
    width = find_sites(host).width
    assert off(logits(permuted(host, order(width))), logits(host)) < 1e-5
    without_channel(host, 5)


@pytest.mark.parametrize("mistake", ["left out", "another axis", "one too many"])
def test_a_wrong_role_is_found_out(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host = lively(tiny_host("llama"))

    def wrong(given: Any) -> Any:
        stream = find_stream(given)
        roles = dict(stream.roles)
        name = "model.layers.1.self_attn.o_proj.weight"
        if mistake == "left out":
            del roles["model.layers.2.post_attention_layernorm.weight"]
        elif mistake == "another axis":
            roles[name] = dataclasses.replace(roles[name], axis=1)
        else:
            roles[name] = dataclasses.replace(roles[name], also=(1,))
        return dataclasses.replace(stream, roles=roles)

    monkeypatch.setattr(edits, "find_stream", wrong)
    with pytest.raises(RealignerError, match=r"permuted, its logits are off by .* of the largest; refused"):
        permuted(host, order(32))


def test_a_host_whose_indices_are_not_alike_is_refused_by_name() -> None:
    host = tiny_host("llama")

    class Halves(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x[..., :16], 2 * x[..., 16:]], -1)

    host.model.norm = Halves()
    with pytest.raises(RealignerError, match=r"logits are off.*slice in model.norm takes its stream apart; refused"):
        permuted(host, order(32))


@pytest.mark.parametrize("family", ["ctrl", "xglm"])
def test_a_position_table_that_is_computed_anew_is_refused(family: str) -> None:
    with pytest.raises(RealignerError, match="is computed from the config, not stored; refused"):
        permuted(tiny_host(family), order(32))


@pytest.mark.parametrize("wrong", [[0] * 32, list(range(31)), list(range(1, 33)), []])
def test_what_is_no_permutation(wrong: list[int]) -> None:
    with pytest.raises(UsageError, match="permutation: not an order of the host's 32 indices"):
        permuted(tiny_host("llama"), wrong)


def test_the_host_stays_itself_and_the_edit_has_no_name() -> None:
    host, _ = tiny_pair()
    host.name_or_path = "somewhere/host"
    other = permuted(host, order(32))
    assert ra.hosts.host_name(other) == ""
    assert other.realigner.tokenizer is host.realigner.tokenizer
    assert other.realigner is not host.realigner
    assert not other.training
    assert not any(p.requires_grad for p in other.parameters())
    assert ra.fingerprint(host).difference(ra.fingerprint(other)) is not None


@pytest.mark.slow
def test_the_census() -> None:
    """Every type is permuted exactly and can lose a channel, or is refused."""
    exact, refused = [], {}
    for model_type in set(MODEL_TYPES) - set(UNBUILDABLE):
        host = lively(tiny_host(model_type))
        try:
            other = permuted(host, order(find_sites(host).width))
        except RealignerError as error:
            refused[model_type] = str(error)
            continue
        without_channel(host, 5)
        assert off(edits._logits(other, torch.float64), edits._logits(host, torch.float64)) < 1e-10, model_type
        assert off(edits._logits(other, torch.float32), edits._logits(host, torch.float32)) < 3e-5, model_type
        exact.append(model_type)
    print(f"{len(exact)} exact, {len(refused)} refused", *refused.values(), sep="\n")
    assert len(exact) >= 160
    assert not any("logits are off" in why for why in refused.values()), refused


@pytest.mark.proof
@pytest.mark.host
def test_the_embedded_host_permutes(embedded: tuple[Any, Any]) -> None:
    host, _ = embedded
    other = permuted(host, order(576))
    assert off(logits(other), logits(host)) < 1e-5
    assert other.lm_head.weight is other.model.embed_tokens.weight


# --- gains ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "offset"), [("llama", 0.0), ("gemma", 1.0), ("gpt2", 0.0)])
def test_the_median_gain(family: str, offset: float) -> None:
    """The effective gain gets the median size and keeps its sign; nothing else changes."""
    host = lively(tiny_host(family))
    (name,) = [name for name, role in roles_of(host).items() if role.kind == "gain" and role.place == "final"]
    gains = host.get_parameter(name)
    gains[3], gains[4] = -0.001 - offset, 0.001 - offset
    median = (gains + offset).abs().median()
    for index, sign in ((3, -1.0), (4, 1.0)):
        other = with_gain(host, index)
        assert torch.allclose(other.get_parameter(name)[index] + offset, sign * median)
        assert changed(host, other) == {name}
        assert int((other.get_parameter(name) != gains).sum()) == 1
    assert float(with_gain(host, 3, 0.25).get_parameter(name)[3]) == -0.25 - offset
    assert float(with_gain(host, 4, 0.25).get_parameter(name)[4]) == 0.25 - offset


def changed(host: Any, other: Any) -> set[str]:
    return {name for name, p in other.named_parameters() if not torch.equal(p, host.get_parameter(name))}


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("gemma", True), ("gpt2", True)])
def test_a_column_of_the_head_is_replaced_and_the_embedding_kept(family: str, tied: bool) -> None:
    host = tiny_host(family)
    host.get_output_embeddings().weight[:, 3] = 7.0  # what no gain lets the head see
    other = with_column(host, 3, 5)
    head, before = other.get_output_embeddings().weight, host.get_output_embeddings().weight
    assert (host.get_input_embeddings().weight is before) == tied
    assert torch.equal(other.get_input_embeddings().weight, host.get_input_embeddings().weight)
    assert torch.equal(head[:, 3].sort().values, before[:, 5].sort().values)
    assert not torch.equal(head[:, 3], before[:, 5])
    rest = [index for index in range(32) if index != 3]
    assert torch.equal(head[:, rest], before[:, rest])
    assert not torch.equal(logits(other), logits(host))


@pytest.mark.parametrize("family", ["olmo", "nanochat"])
def test_norms_without_gains_are_refused(family: str) -> None:
    with pytest.raises(RealignerError, match="its final norm has no gain"):
        with_gain(tiny_host(family), 3)


def test_a_gain_that_is_not_the_weight_is_refused() -> None:
    host = tiny_host("llama")
    norm = host.model.norm
    norm.forward = lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight.exp()
    with pytest.raises(RealignerError, match=r"model.norm.weight: its weight does not multiply as it is"):
        with_gain(host, 3)


def test_odd_values_are_refused() -> None:
    host = tiny_host("llama")
    with pytest.raises(UsageError, match='value: "median" or a number'):
        with_gain(host, 3, "mean")
    for edit in (with_gain, without_channel):
        for index in (-1, 32):
            with pytest.raises(UsageError, match="index: the host's residual stream has 0 to 31"):
                edit(host, index)


# --- a channel taken out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SOME)
def test_the_channel_is_silent_at_every_site(family: str) -> None:
    host = lively(tiny_host(family))
    other = without_channel(host, 5)
    assert all(bool((h[..., 5] == 0).all()) for h in residuals(other))
    assert changed(host, other) <= {name for name, role in roles_of(host).items() if role.stays}
    before, after = residuals(host), residuals(other)
    assert bool((before[0][..., 5] != 0).any())
    assert bool((after[0][..., 6] != 0).any())


def test_a_norm_that_feeds_a_branch_keeps_its_gain() -> None:
    """Silencing the stream is not silencing what reads it."""
    host = lively(tiny_host("mixtral"))
    host.config._experts_implementation = "eager"  # sums up in a tensor made like the norm's output
    assert not any("layernorm" in name for name in changed(host, without_channel(host, 5)))


def test_a_channel_that_weights_cannot_silence_is_refused() -> None:
    with pytest.raises(RealignerError, match=r"index 5 cannot be silenced by weights \(layer 0\)"):
        without_channel(lively(tiny_host("xglm")), 5)  # a computed position table


# --- random and saved -------------------------------------------------------------------------------------------------------


def test_randomised() -> None:
    host, _ = tiny_pair(seed=1)
    state, rng = torch.get_rng_state(), copy.deepcopy(host.state_dict())
    other = randomised(host.to(torch.bfloat16), 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert other.dtype == torch.bfloat16
    assert type(other) is type(host)
    assert other.config.to_dict() == host.config.to_dict() | {"_name_or_path": "", "dtype": "bfloat16"}
    assert torch.equal(other.lm_head.weight, randomised(host, 5).lm_head.weight)
    assert not torch.equal(other.lm_head.weight, randomised(host, 6).lm_head.weight)
    assert set(rng) == set(other.state_dict())
    assert not any(p.requires_grad for p in other.parameters())
    assert other.realigner.tokenizer is host.realigner.tokenizer


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_saved_and_loaded(family: str, tmp_path: Path) -> None:
    host = lively(tiny_pair(family)[0])
    other = permuted(host, order(32))
    path = save_edited(other, tiny_tokenizer(), tmp_path / "hosts" / "permuted")
    loaded, tokenizer = ra.load_host(str(path), dtype="float32", device="cpu")
    assert torch.equal(logits(loaded), logits(other))
    assert ra.weights_hash(loaded) == ra.weights_hash(other)
    assert tokenizer.decode(tokenizer("so")["input_ids"]) == "so"
    assert ra.hosts.host_name(loaded) == str(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["permuted"]


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, tokenizer = tiny_pair()
    (tmp_path / "taken").mkdir()
    with pytest.raises(RealignerError, match="taken: exists already; choose another place"):
        save_edited(host, tokenizer, tmp_path / "taken")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", full)
    with pytest.raises(RealignerError, match=r"new: cannot be written \(No space left on device\)"):
        save_edited(host, tokenizer, tmp_path / "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


def test_a_quantised_host_is_refused() -> None:
    host = tiny_host("llama")
    host.lm_head.weight = nn.Parameter(torch.ones(101, 32, dtype=torch.int8), requires_grad=False)
    for edit in (with_gain, without_channel):
        with pytest.raises(RealignerError, match=r"its weights are quantised \(lm_head.weight\); load it in float"):
            edit(host, 3)


def test_a_tied_head_keeps_its_column_without_the_channel(tmp_path: Path) -> None:
    """Else what an IRM adds there would go unseen; so it is after saving and loading, too."""
    host = tiny_host("llama", tie_word_embeddings=True)
    other = without_channel(host, 3)
    assert not other.model.embed_tokens.weight[:, 3].any()
    assert torch.equal(other.lm_head.weight, host.lm_head.weight)
    assert other.lm_head.weight[:, 3].any()
    assert host.lm_head.weight is host.model.embed_tokens.weight
    other.save_pretrained(tmp_path)
    loaded = type(host).from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, host.lm_head.weight)
    assert not loaded.model.embed_tokens.weight[:, 3].any()
