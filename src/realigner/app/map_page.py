"""The map's own page within the app: the report's styles, controls and scripts; and what it says of one index."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from typing import Any

from jinja2 import ChoiceLoader, Environment, FileSystemLoader
from markupsafe import Markup

from realigner.app.live_map import MARKED, LiveMap
from realigner.errors import UsageError
from realigner.explain.explanation import Explanation
from realigner.report.charts import Line, fmt
from realigner.report.explanation_section import MARKS, index_summary
from realigner.report.page import templates
from realigner.report.page_tables import charted


@lru_cache(1)
def _templates() -> Environment:
    """The report's templates, and the app's beside them."""
    report = templates()
    own = FileSystemLoader(str(files("realigner") / "app"))
    assert report.loader is not None
    return report.overlay(loader=ChoiceLoader([own, report.loader]))


def map_page(layers: Sequence[int], neurons: int) -> str:
    """The page, which is put into a frame and makes no requests; it is empty until it is given a picture.

    Args:
        layers, neurons: the rows and the number of columns of every map.
    """
    item = {
        "prefix": "",
        "runs": [{"name": ""}],
        "start": {"left": "", "right": None},
        "has_tokens": True,
        "prompts": {0: ""},
        "marked": MARKED,
        "note": "Shaded by energy (the sum over layers and indices of delta²; square root, over the text's largest). "
        "Underlined: the prompt. Click a token for its map. Means are over all tokens so far.",
    }
    shape = Markup(json.dumps({"layers": list(layers), "neurons": neurons}))
    return _templates().get_template("live_map.html.j2").render(item=item, shape=shape)


def index_panel(live: LiveMap, run: str, index: int, explained: Sequence[Explanation] = (), position: int | None = None) -> str:
    """What is known of one index, as HTML: its profile over layers, its largest tokens, and what explanations say.

    Args:
        live: the maps.
        run: of the map.
        index: the neuron index.
        explained: explanations of the host.
        position: a token, whose values are drawn too.

    Raises:
        UsageError: for a run, an index or a token that is not there.
    """
    means = live.means(run) if run in live.runs and live.tokens else {}
    if not means or not 0 <= index < means["signed"].shape[1]:
        raise UsageError(f"map: there is no index {index} of {run!r}")
    layers = live.layers
    lines = [
        Line("mean |delta|", layers, means["absolute"][:, index].tolist(), 1),
        Line("mean delta", layers, means["signed"][:, index].tolist(), 2, 1),
    ]
    if position is not None:
        values = live.delta(run, position)[:, index].tolist()
        lines.append(Line(f"token {position + 1}", layers, values, 3, 2))
    ranked = live.leading(run, means["signed"].shape[1])
    tokens = live.largest(run, index)
    return (
        _templates()
        .get_template("index_panel.html.j2")
        .render(
            index=index,
            run=run,
            rank=ranked.index(index) + 1,
            neurons=len(ranked),
            profile=charted(lines, "layer", "delta", f"Index {index} through the layers", False),
            tokens=[{**token, "value": fmt(token["value"])} for token in tokens],
            i={"index": index, "host": index_summary(explained, index)},
            verdicts=[_verdict(item) for item in explained if item.index == index],
            explained=bool(explained),
        )
    )


def _verdict(item: Explanation) -> dict[str, Any]:
    """Why an index leads, in one sentence, and what was asked to find that out."""
    return {"words": item.words, "conclusions": [{"mark": MARKS[own.answer], **own.model_dump()} for own in item.conclusions]}
