"""Roles: what each parameter is to the residual stream, against what is known of families by reading their code."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from realigner.errors import RealignerError
from realigner.explain.axes import rule_of
from realigner.explain.roles import Role, _siblings, final_norm, find_stream, roles_of
from realigner.tiny import tiny_host
from tests.reference import FAMILIES

# Written down by hand: of layer 1, parameter -> (kind, axis, place, offset, stays).
LAYERS: dict[str, tuple[str, dict[str, tuple[Any, ...]]]] = {
    "llama": (
        "model.layers.1.",
        {
            "self_attn.q_proj.weight": ("read", 1, "attention", 0, False),
            "self_attn.k_proj.weight": ("read", 1, "attention", 0, False),
            "self_attn.v_proj.weight": ("read", 1, "attention", 0, False),
            "self_attn.o_proj.weight": ("write", 0, "attention", 0, True),
            "mlp.gate_proj.weight": ("read", 1, "mlp", 0, False),
            "mlp.up_proj.weight": ("read", 1, "mlp", 0, False),
            "mlp.down_proj.weight": ("write", 0, "mlp", 0, True),
            "input_layernorm.weight": ("gain", 0, "attention", 0, False),
            "post_attention_layernorm.weight": ("gain", 0, "mlp", 0, False),
        },
    ),
    "gpt2": (  # transformers' Conv1D stores [in, out]
        "transformer.h.1.",
        {
            "ln_1.weight": ("gain", 0, "attention", 0, False),
            "ln_1.bias": ("shift", 0, "attention", 0, False),
            "attn.c_attn.weight": ("read", 0, "attention", 0, False),
            "attn.c_proj.weight": ("write", 1, "attention", 0, True),
            "attn.c_proj.bias": ("bias", 0, "attention", 0, True),
            "ln_2.weight": ("gain", 0, "mlp", 0, False),
            "ln_2.bias": ("shift", 0, "mlp", 0, False),
            "mlp.c_fc.weight": ("read", 0, "mlp", 0, False),
            "mlp.c_proj.weight": ("write", 1, "mlp", 0, True),
            "mlp.c_proj.bias": ("bias", 0, "mlp", 0, True),
        },
    ),
    "gemma2": (  # 1 + weight; norms of the branches' outputs
        "model.layers.1.",
        {
            "self_attn.q_proj.weight": ("read", 1, "attention", 0, False),
            "self_attn.k_proj.weight": ("read", 1, "attention", 0, False),
            "self_attn.v_proj.weight": ("read", 1, "attention", 0, False),
            "self_attn.o_proj.weight": ("write", 0, "attention", 0, True),
            "mlp.gate_proj.weight": ("read", 1, "mlp", 0, False),
            "mlp.up_proj.weight": ("read", 1, "mlp", 0, False),
            "mlp.down_proj.weight": ("write", 0, "mlp", 0, True),
            "input_layernorm.weight": ("gain", 0, "attention", 1, False),
            "post_attention_layernorm.weight": ("gain", 0, "attention", 1, True),
            "pre_feedforward_layernorm.weight": ("gain", 0, "mlp", 1, False),
            "post_feedforward_layernorm.weight": ("gain", 0, "mlp", 1, True),
        },
    ),
    "olmo2": (  # q_norm and k_norm are not of the stream, however wide
        "model.layers.1.",
        {
            "self_attn.q_proj.weight": ("read", 1, "attention", 0, False),
            "self_attn.k_proj.weight": ("read", 1, "attention", 0, False),
            "self_attn.v_proj.weight": ("read", 1, "attention", 0, False),
            "self_attn.o_proj.weight": ("write", 0, "attention", 0, True),
            "mlp.gate_proj.weight": ("read", 1, "mlp", 0, False),
            "mlp.up_proj.weight": ("read", 1, "mlp", 0, False),
            "mlp.down_proj.weight": ("write", 0, "mlp", 0, True),
            "post_attention_layernorm.weight": ("gain", 0, "attention", 0, True),
            "post_feedforward_layernorm.weight": ("gain", 0, "mlp", 0, True),
        },
    ),
    "gpt_neox": (  # parallel, each branch with a norm of its own
        "gpt_neox.layers.1.",
        {
            "input_layernorm.weight": ("gain", 0, "attention", 0, False),
            "input_layernorm.bias": ("shift", 0, "attention", 0, False),
            "post_attention_layernorm.weight": ("gain", 0, "mlp", 0, False),
            "post_attention_layernorm.bias": ("shift", 0, "mlp", 0, False),
            "attention.query_key_value.weight": ("read", 1, "attention", 0, False),
            "attention.dense.weight": ("write", 0, "attention", 0, True),
            "attention.dense.bias": ("bias", 0, "attention", 0, True),
            "mlp.dense_h_to_4h.weight": ("read", 1, "mlp", 0, False),
            "mlp.dense_4h_to_h.weight": ("write", 0, "mlp", 0, True),
            "mlp.dense_4h_to_h.bias": ("bias", 0, "mlp", 0, True),
        },
    ),
    "mixtral": (  # experts in one tensor of three axes
        "model.layers.1.",
        {
            "self_attn.q_proj.weight": ("read", 1, "attention", 0, False),
            "self_attn.k_proj.weight": ("read", 1, "attention", 0, False),
            "self_attn.v_proj.weight": ("read", 1, "attention", 0, False),
            "self_attn.o_proj.weight": ("write", 0, "attention", 0, True),
            "mlp.gate.weight": ("read", 1, "mlp", 0, False),
            "mlp.experts.gate_up_proj": ("read", 2, "mlp", 0, False),
            "mlp.experts.down_proj": ("write", 1, "mlp", 0, True),
            "input_layernorm.weight": ("gain", 0, "attention", 0, False),
            "post_attention_layernorm.weight": ("gain", 0, "mlp", 0, False),
        },
    ),
    "phi": (  # parallel, one norm for both branches: that of the branch that runs first
        "model.layers.1.",
        {
            "self_attn.q_proj.weight": ("read", 1, "attention", 0, False),
            "self_attn.k_proj.weight": ("read", 1, "attention", 0, False),
            "self_attn.v_proj.weight": ("read", 1, "attention", 0, False),
            "self_attn.dense.weight": ("write", 0, "attention", 0, True),
            "self_attn.dense.bias": ("bias", 0, "attention", 0, True),
            "mlp.fc1.weight": ("read", 1, "mlp", 0, False),
            "mlp.fc2.weight": ("write", 0, "mlp", 0, True),
            "mlp.fc2.bias": ("bias", 0, "mlp", 0, True),
            "input_layernorm.weight": ("gain", 0, "attention", 0, False),
            "input_layernorm.bias": ("shift", 0, "attention", 0, False),
        },
    ),
}


@pytest.mark.parametrize("family", LAYERS)
def test_a_layer_as_known_from_its_code(family: str) -> None:
    """Every parameter of the layer is listed or has no role, though hidden, head and value widths are all 32."""
    start, known = LAYERS[family]
    roles = {name: role for name, role in roles_of(tiny_host(family)).items() if name.startswith(start)}
    found = {name.removeprefix(start): (r.kind, r.axis, r.place, r.offset, r.stays) for name, r in roles.items()}
    assert found == known
    assert all(role.layer == 1 and not role.also for role in roles.values())


def test_around_the_layers() -> None:
    roles = roles_of(tiny_host("gpt2"))
    embedding = Role("embedding", 1, "embedding", None, stays=True)
    assert roles["transformer.wte.weight"] == roles["transformer.wpe.weight"] == embedding
    assert roles["transformer.ln_f.weight"] == Role("gain", 0, "final", None)
    assert roles["transformer.ln_f.bias"] == Role("shift", 0, "final", None)
    assert roles["lm_head.weight"] == Role("read", 1, "head", None)  # one tensor with wte, another role under this name


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.norm"),
        ("gpt2", "transformer.ln_f"),
        ("opt", "model.decoder.final_layer_norm"),
        ("gpt_neox", "gpt_neox.final_layer_norm"),
        ("lfm2", "model.embedding_norm"),  # names lie
        ("olmo", "model.norm"),  # has no weights
        ("bert", "cls.predictions.transform.LayerNorm"),
        ("openai-gpt", "transformer.h.2.ln_2"),
    ],
)
def test_the_final_norm(family: str, name: str) -> None:
    host = tiny_host(family)
    module, found = final_norm(host)
    assert found == name
    assert host.get_submodule(name) is module
    final = [other for other, role in roles_of(host).items() if role.place == "final" and role.kind == "gain"]
    assert final == [f"{name}.weight"] * (family != "olmo")


def test_a_host_without_a_final_norm() -> None:
    host = tiny_host("llama")
    host.model.norm = nn.Identity()
    with pytest.raises(RealignerError, match="nothing norms the residual stream between"):
        final_norm(host)


def test_hosts_that_norm_after_adding() -> None:
    """OPT-350m's kind: a norm of the stream itself has the place of what reads it next; the embedding is projected."""
    roles = roles_of(tiny_host("opt", do_layer_norm_before=False, word_embed_proj_dim=16))
    assert "model.decoder.embed_tokens.weight" not in roles
    assert roles["model.decoder.project_in.weight"] == Role("write", 0, "embedding", None, stays=True)
    assert roles["model.decoder.project_out.weight"] == Role("read", 1, "head", None)
    places = {
        name: roles[f"model.decoder.layers.{name}.weight"].place for name in ("1.self_attn_layer_norm", "1.final_layer_norm")
    }
    assert places == {"1.self_attn_layer_norm": "mlp", "1.final_layer_norm": "attention"}
    assert roles["model.decoder.layers.1.final_layer_norm.weight"].stays


def test_a_norm_of_the_embedding() -> None:
    role = roles_of(tiny_host("bloom"))["transformer.word_embeddings_layernorm.weight"]
    assert (role.kind, role.place, role.layer, role.stays) == ("gain", "embedding", None, True)


def test_a_matrix_within_the_stream() -> None:
    """The head of BERT's kind turns the stream once more, and its decoder is tied to the embedding."""
    role = roles_of(tiny_host("bert"))["cls.predictions.transform.dense.weight"]
    assert (role.kind, role.axes) == ("read", (1, 0))


def test_a_vector_outside_a_norm_is_no_gain() -> None:
    roles = roles_of(tiny_host("rwkv"))
    assert roles["rwkv.blocks.1.attention.time_mix_key"].kind == "scale"
    assert roles["rwkv.blocks.1.ln1.weight"].kind == "gain"


@pytest.mark.parametrize(
    ("family", "offset"), [("llama", 0), ("gemma", 1), ("gemma3_text", 1), ("nemotron", 1), ("qwen3_next", 1)]
)
def test_offsets(family: str, offset: float) -> None:
    gains = [role for role in roles_of(tiny_host(family)).values() if role.kind == "gain"]
    assert {role.offset for role in gains} == {offset}


def test_a_weight_used_in_another_way_has_no_known_offset() -> None:
    host = tiny_host("llama")
    norm = host.model.norm
    norm.forward = lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight.exp()
    assert torch.isnan(torch.tensor(roles_of(host)["model.norm.weight"].offset))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_every_precision_tells_the_same(family: str, dtype: torch.dtype) -> None:
    host = tiny_host(family)
    host.config._experts_implementation = "eager"  # the grouped product has no float64
    assert roles_of(copy.deepcopy(host).to(dtype)) == roles_of(host) == roles_of(tiny_host(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_host_is_left_as_it_was(family: str) -> None:
    host = tiny_host(family).train()
    state = copy.deepcopy(host.state_dict())
    find_stream(host)
    assert host.training
    assert all(torch.equal(a, b) for a, b in zip(state.values(), host.state_dict().values(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.modules())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "qwen3_next"])
def test_how_experts_are_computed_does_not_matter(family: str) -> None:
    host = tiny_host(family)
    grouped = roles_of(host)
    host.config._experts_implementation = "eager"
    assert roles_of(host) == grouped


def test_layers_of_one_branch() -> None:
    """What mixes positions is attention, whatever it is called; a mixture of experts is not, however it counts its tokens."""
    roles = roles_of(tiny_host("nemotron_h"))  # a state space, experts, attention, an MLP; all are called mixer
    places = [roles[f"model.layers.{layer}.norm.weight"].place for layer in range(4)]
    assert places == ["attention", "mlp", "attention", "mlp"]


def test_sizes_do_not_matter() -> None:
    """Every width equal, and as many tokens as indices: nothing is told from a size."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 8}
    small = roles_of(tiny_host("llama", **sizes, head_dim=8, pad_token_id=0))
    assert small == roles_of(tiny_host("llama"))


def test_an_expert_that_no_token_reached() -> None:
    """It has the role of its neighbour, in its own layer."""
    role = Role("write", 0, "mlp", 0, stays=True)
    parameters = {f"layers.{layer}.experts.{n}.down": torch.zeros(4, 6) for layer in (0, 1) for n in (0, 1)}
    seen = {"layers.0.experts.0.down": role}
    unseen = {name: tensor.shape for name, tensor in parameters.items() if name not in seen} | {"other": torch.Size([4, 6])}
    found = _siblings(unseen, seen, parameters, "layers")
    assert {name: other.layer for name, other in found.items()} == {
        "layers.0.experts.1.down": 0,
        "layers.1.experts.0.down": 1,
        "layers.1.experts.1.down": 1,
    }
    assert {(other.kind, other.axis, other.place, other.stays) for other in found.values()} == {("write", 0, "mlp", True)}


def test_what_takes_the_stream_apart_is_named() -> None:
    host = tiny_host("llama")
    norm = host.model.layers[1].input_layernorm
    plain = type(norm).forward
    norm.forward = lambda x: torch.cat([plain(norm, x)[..., :16], plain(norm, x)[..., 16:] * 2], -1)
    broken = find_stream(host).broken
    assert broken
    assert all("model.layers.1.input_layernorm" in what for what in broken)
    assert not find_stream(tiny_host("llama")).broken


# --- the rules, one by one ------------------------------------------------------------------------------------------------


class Joins(TorchDispatchMode):
    """Collects, for each operation, which axes its rule joins, as sizes (all different here)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[str, set[int], set[int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        rule = rule_of(func)
        if rule is None:  # makes a tensor out of nothing
            assert not any(isinstance(a, torch.Tensor) for a in args)
            return out
        outs = [out] if isinstance(out, torch.Tensor) else [o for o in out if isinstance(o, torch.Tensor)]
        joined = rule(args, kwargs or {}, outs)
        pairs = {a.tensor.shape[a.number] for a, b in joined.pairs if any(b.tensor is o for o in outs)}
        self.found.append((func.overloadpacket.__name__, pairs, {a.tensor.shape[a.number] for a in joined.spent}))
        return out


X = torch.randn(2, 3, 5)
NORM = (torch.ones(5), torch.zeros(5))
PICK = torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize(
    ("operation", "joined", "spent"),
    [
        (lambda: X.view(6, 5), {5}, set()),
        (lambda: X.view(2, 3, 1, 5), {2, 3, 5}, set()),
        (lambda: X.reshape(2, 15), {2}, set()),
        (lambda: X.transpose(0, 2), {2, 3, 5}, set()),
        (lambda: X.permute(2, 0, 1), {2, 3, 5}, set()),
        (lambda: X[:, 1], {2, 5}, set()),
        (lambda: X[..., :4], {2, 3}, set()),
        (lambda: X.unsqueeze(-2), {2, 3, 5}, set()),
        (lambda: X.unbind(1), {2, 5}, set()),
        (lambda: X + torch.randn(5), {2, 3, 5}, set()),
        (lambda: X.mean(-1, keepdim=True), {2, 3}, {5}),
        (lambda: X.sum((0, 1)), {5}, {2, 3}),
        (lambda: X.sum(), set(), {2, 3, 5}),
        (lambda: torch.linalg.vector_norm(X, dim=-1), {2, 3}, {5}),
        (lambda: torch.cat([X, X], 1), {2, 5}, set()),
        (lambda: torch.stack([X, X]), {2, 3, 5}, set()),
        (lambda: X[PICK], {3, 5}, set()),
        (lambda: X[:, PICK], {2, 5}, set()),
        (lambda: X[PICK, PICK], {5}, set()),
        (lambda: X.index_select(1, PICK), {2, 5}, set()),
        (lambda: torch.bmm(X, torch.randn(2, 5, 7)), {2, 3, 7}, {5}),
        (lambda: torch.mm(X[0], torch.randn(5, 7)), {3, 7}, {5}),
        (lambda: torch.mv(X[0], torch.randn(5)), {3}, {5}),
        (lambda: F.embedding(PICK.view(2, 2), torch.randn(11, 5)), {5}, set()),
        (lambda: F.layer_norm(X, (5,), *NORM), {2, 3, 5}, {5}),
        (lambda: F.conv1d(X, torch.randn(7, 3, 1)), {2, 7}, {3}),
        (lambda: F.conv1d(X, torch.randn(3, 1, 2), groups=3), {2, 3}, set()),
        (lambda: X.clone().index_add_(0, PICK, torch.randn(4, 3, 5)), {2, 3, 5}, set()),
    ],
)
def test_rules(operation: Any, joined: set[int], spent: set[int]) -> None:
    with Joins() as seen:
        operation()
    _, pairs, gone = seen.found[-1]
    assert (pairs, gone) == (joined, spent)
