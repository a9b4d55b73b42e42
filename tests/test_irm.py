"""The network: shapes, presets, layer choices, initialisation, and equality with a plain reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from realigner.errors import UsageError
from realigner.irm import IRM, IRMShape, parse_layers
from tests.reference import reference_irm


def test_paper_preset_is_the_papers_shape() -> None:
    irm = IRMShape(preset="paper").build(hidden_size=8, num_layers=5)
    linears = [(m.in_features, m.out_features) for m in irm.modules() if isinstance(m, torch.nn.Linear)]
    assert linears == [(8, 24), (24, 24), (24, 24), (24, 24), (24, 40)]
    assert sum(isinstance(m, torch.nn.ReLU) for m in irm.modules()) == 4
    assert not irm.input_norm
    # At Llama-2-7B's size: 2.11 billion parameters (notes/reference.md).
    assert IRMShape(preset="paper").parameter_count(4096, 32) == 2_114_109_440


def test_paper_preset_keeps_the_default_initialisation() -> None:
    torch.manual_seed(3)
    irm = IRMShape(preset="paper").build(8, 5)
    torch.manual_seed(3)
    plain = [torch.nn.Linear(a, b) for a, b in [(8, 24), (24, 24), (24, 24), (24, 24), (24, 40)]]
    assert torch.equal(irm.output.weight, plain[-1].weight)
    assert torch.equal(irm.output.bias, plain[-1].bias)


def test_compact_preset_is_a_small_part_of_a_7b_host() -> None:
    shares = [IRMShape(preset="compact", edition=edition).parameter_count(4096, 32) / 6.74e9 for edition in (1, 2)]
    assert 0.005 < shares[0] < 0.015
    assert 0.003 < shares[1] < 0.004
    assert IRMShape().parameter_count(576, 30) == 458_420
    assert IRMShape(edition=1).parameter_count(576, 30) == 1_353_152


def test_compact_preset_starts_near_zero() -> None:
    irm = IRMShape(preset="compact").build(64, 4)
    h0 = torch.randn(3, 7, 64)
    assert irm(h0).abs().max() < 0.05


@pytest.mark.parametrize("preset", ["compact", "paper"])
def test_equals_the_reference(preset: str) -> None:
    irm = IRMShape(preset=preset, layers=[0, 2], output_std=0.5).build(16, 4)
    h0 = torch.randn(2, 3, 16)
    compact = preset == "compact"
    want = reference_irm(irm.state_dict(), h0, input_norm=compact, factorised=compact)
    assert irm(h0).shape == (2, 3, 2, 16)
    assert torch.allclose(irm(h0), want, atol=1e-6)


def test_position_wise() -> None:
    irm = IRMShape(output_std=0.5).build(16, 2)
    h0 = torch.randn(1, 5, 16)
    assert torch.allclose(irm(h0)[:, 3], irm(h0[:, 3:4])[:, 0], atol=1e-6)


def test_only_chosen_layers_are_stored() -> None:
    assert IRMShape(layers=[1], rank=0, widths=[4]).build(8, 30).output.out_features == 8


@pytest.mark.parametrize(
    ("given", "want"),
    [("all", (0, 1, 2, 3)), ("0-2", (0, 1, 2)), ("3, 0-1", (0, 1, 3)), ([2, 0], (0, 2)), (range(1, 3), (1, 2)), ("2", (2,))],
)
def test_layer_choices(given: Any, want: tuple[int, ...]) -> None:
    assert parse_layers(given, 4) == want


@pytest.mark.parametrize("given", ["", "a", "2-1", "0,,1", "-1", "4", [4], [-1], [], [1, 1], [True], [1.5], 3, None, "0-4"])
def test_bad_layer_choices_name_the_field(given: Any) -> None:
    with pytest.raises(UsageError, match="layers"):
        parse_layers(given, 4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("preset", "huge"),
        ("preset", None),
        ("rank", -1),
        ("rank", 1.5),
        ("rank", True),
        ("widths", []),
        ("widths", [0]),
        ("widths", "8"),
        ("widths", 8),
        ("output_std", -1.0),
        ("output_std", float("nan")),
        ("output_std", "0.1"),
        ("input_norm", "yes"),
        ("layers", "x"),
    ],
)
def test_bad_values_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{field}"):
        IRMShape(**{field: value}).validate()


@settings(max_examples=60, deadline=None)
@given(
    layers=st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True),
    widths=st.none() | st.lists(st.integers(1, 20), min_size=1, max_size=3),
    rank=st.none() | st.integers(0, 8),
    preset=st.sampled_from(["compact", "paper"]),
)
def test_any_valid_shape_builds_what_it_counts(
    layers: list[int], widths: list[int] | None, rank: int | None, preset: str
) -> None:
    shape = IRMShape(preset=preset, layers=layers, widths=widths, rank=rank)
    irm = shape.build(8, 6)
    assert isinstance(irm, IRM)
    assert irm(torch.zeros(1, 2, 8)).shape == (1, 2, len(layers), 8)
    assert shape.parameter_count(8, 6) == sum(p.numel() for p in irm.parameters())
