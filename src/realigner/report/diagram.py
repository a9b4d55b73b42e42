"""Figure 1 of the paper: the host, its residual stream, and the IRM that reads it once and adds to it in every chosen layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from realigner.report.plot_style import COLUMN, PAGE, STYLE

INK, SOFT, TRAINED, FILL, TINT = "#1d2430", "#566072", "#b5432f", "#eef1f4", "#f8e6e1"


def figure1(record: Mapping[str, Any], neurons: int, width: float = COLUMN) -> Figure:
    """The architecture of a run, from what its run.json says.

    Args:
        record: run.json: ``host`` (name, fingerprint), ``irm`` (layers, parameters, site) and ``recipe``.
        neurons: width of the residual stream.
        width: in inches.
    """
    irm, host = record["irm"], record["host"]
    layers = list(irm["layers"])
    depth = int((host.get("fingerprint") or {}).get("num_layers") or max(layers) + 1)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(width, width * 0.98 if width < PAGE else 4.6), layout="constrained")
        axes.set(xlim=(0, 10), ylim=(0, 10.2))
        axes.axis("off")
        places = _host(axes, str(host.get("name") or "host"), layers, depth)
        _network(axes, record, neurons, len(layers), places)
    return figure


def _host(axes: Axes, name: str, layers: Sequence[int], depth: int) -> list[tuple[int | None, float]]:
    """The host's layers from bottom to top; where each box is: (layer, y), None for those not drawn."""
    shown: list[int | None] = [*range(depth)]
    if depth > 4:  # the first two, and the last: of the IRM's layers where it leaves out the host's
        first = 0 if layers[0] <= 1 else min(layers[0], depth - 2)
        last = layers[-1] if layers[-1] > first + 1 else depth - 1
        shown = [first, first + 1, *([None] if last > first + 2 else []), *([last] if last > first + 1 else [])]
    axes.text(0, 10.0, f"{name}, frozen", ha="left", va="top", color=INK, fontsize=8, weight="bold")
    bottom, top = 1.3, 8.6
    height = (top - bottom) / len(shown)
    axes.plot([2.3, 2.3], [0.75, 9.05], color=INK, lw=1.2, zorder=0)
    axes.text(2.3, 0.55, "tokens", ha="center", va="top", color=SOFT, fontsize=7)
    axes.text(2.3, 9.1, "head", ha="center", va="bottom", color=SOFT, fontsize=7)
    places: list[tuple[int | None, float]] = []
    for number, layer in enumerate(shown):
        y = bottom + number * height
        if layer is None:
            axes.text(2.3, y + height / 2, "⋮", ha="center", va="center", fontsize=11, color=SOFT,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
            continue
        _box(axes, (0.45, y + 0.1), 2.55, height - 0.25, 0.15, fc=FILL, ec=INK if layer in layers else SOFT, lw=0.7)
        axes.text(0.12, y + height / 2, f"layer {layer}", ha="center", va="center", rotation=90, color=SOFT, fontsize=7)
        half = min(0.26, 0.16 * height)
        for name, at in (("attn", y + 0.22 * height), ("ffn", y + 0.74 * height)):
            _box(axes, (0.62, at - half), 1.3, 2 * half, 0.08, fc="white", ec=SOFT, lw=0.5)
            axes.text(1.27, at, name, ha="center", va="center", fontsize=7, color=INK)
            axes.plot([1.92, 2.3], [at, at], color=SOFT, lw=0.6, zorder=1)
        places.append((layer if layer in layers else None, y + 0.49 * height))
    axes.plot([2.3, 2.3], [0.75, 9.05], color=INK, lw=1.2, zorder=2)
    return places


def _network(
    axes: Axes, record: Mapping[str, Any], neurons: int, outputs: int, places: Sequence[tuple[int | None, float]]
) -> None:
    """The IRM at the right: what it reads, its widths, and an arrow into every layer that it adds to."""
    irm = record["irm"]
    widths = _widths(record, neurons, outputs)
    read = places[0][1]
    axes.text(7.9, 10.0, "IRM, trained", ha="center", va="top", color=TRAINED, fontsize=8, weight="bold")
    share = 100 * irm["parameters"] / irm["host_parameters"]
    text = f"{irm['parameters']:,} parameters\n{share:.1f}% of the host"
    axes.text(7.9, 9.45, text, ha="center", va="top", color=SOFT, fontsize=7, linespacing=1.3)
    low, high = 1.1, 7.6
    step = (high - low) / max(1, len(widths) - 1)
    for number, (size, label) in enumerate(widths):
        y = low + number * step
        half = 0.55 + 1.1 * min(1.0, size / max(neurons, 1)) ** 0.5 if number < len(widths) - 1 else 1.75
        _box(axes, (7.9 - half, y - 0.26), 2 * half, 0.52, 0.12, fc=TINT, ec=TRAINED, lw=0.7)
        axes.text(7.9, y, label, ha="center", va="center", fontsize=7, color=INK)
        if number:
            _arrow(axes, (7.9, y - step + 0.28), (7.9, y - 0.28), TRAINED)
    _arrow(axes, (2.42, read - 0.12), (7.9 - 0.6 - 1.05, low), SOFT, bend=0.15)
    axes.text(4.75, 0.62, "$h_0$", ha="center", va="center", fontsize=8, color=INK)
    for layer, y in places:
        if layer is not None:
            _arrow(axes, (7.9 - 1.75, high), (2.42, y), TRAINED, bend=0.12)
            axes.plot([2.3], [y], "o", color="white", mec=TRAINED, ms=6.5, mew=0.8, zorder=3)
            axes.plot([2.3], [y], "+", color=TRAINED, ms=4.5, mew=0.8, zorder=4)
    axes.text(4.6, 8.35, r"$\delta_l$", ha="center", va="center", fontsize=8, color=TRAINED)


def _widths(record: Mapping[str, Any], neurons: int, outputs: int) -> list[tuple[int, str]]:
    """Widths from h0 to the deltas, with labels, as the recipe's network has them."""
    recipe = record.get("recipe", {})
    import torch

    from realigner.irm import IRMShape

    own = {field.name: recipe[field.name] for field in fields(IRMShape) if recipe.get(field.name) is not None}
    shape = IRMShape(**({"edition": 1} | own | {"preset": str(record["irm"]["preset"]), "layers": list(range(outputs))}))
    with torch.device("meta"):
        network = shape.build(neurons, outputs)
    widths = [(neurons, f"{neurons:,}" + (", scaled" if network.input_norm else ""))]
    modules = list(network.trunk)
    for module, following in zip(modules, [*modules[1:], None], strict=True):
        if isinstance(module, torch.nn.Linear):
            bent = f" {type(following).__name__}" if isinstance(following, (torch.nn.ReLU, torch.nn.SiLU)) else ""
            widths.append((module.out_features, f"{module.out_features:,}{bent}"))
    return [*widths, (neurons, f"{outputs} \u00d7 {neurons:,}")]


def _box(axes: Axes, corner: tuple[float, float], width: float, height: float, rounding: float, **look: Any) -> None:
    style = f"round,pad=0,rounding_size={rounding}"
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, **look))


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, bend: float = 0.0) -> None:
    look: Any = {"arrowstyle": "-|>", "mutation_scale": 6, "lw": 0.7, "color": colour, "zorder": 2}
    axes.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", **look))
