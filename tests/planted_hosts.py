"""Tiny random hosts with a channel planted in their residual stream, and rows to train on: explanations with a known truth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import realigner as ra
from realigner.explain import explain
from realigner.explain.explanation import IndexFact, IndexRank, TrialResult
from realigner.explain.verdict import Evidence, Spread, conclude
from realigner.tiny import tiny_host
from realigner.training import Recipe, train

Channel = Literal["", "constant", "random sign"]
Gain = Literal["", "zero", "one", "median"]
Head = Literal["", "small", "tied"]
Cell = tuple[Channel, Gain, float, Head]
WIDTH, WORDS, PLANTED = 64, 100, 17
_DECISIVE = ("residual", "residual_first", "residual_delimiter", "final_gain", "head_norm", "head_reach")
# what is planted -> the verdicts that name it. A channel that the head sees is not led by: its gradient's two parts cancel
CELLS: dict[Cell, tuple[str, ...]] = {
    ("", "", 1, ""): ("none", "chance", "cannot tell", "not leading"),
    ("", "zero", 1, ""): ("gain",),
    ("", "", 1, "small"): ("head",),
    **{
        (channel, "zero", size, ""): ("channel through the norm",)
        for channel in ("constant", "random sign")
        for size in (5, 40)
    },
    ("random sign", "zero", 40, "tied"): ("channel through the norm",),
    # The head's column is the same for every token: it moves no probability.
    **{("constant", "", size, "tied"): ("channel through the norm",) for size in (5, 40)},
    **{
        (channel, gain, size, ""): ("channel", "idle channel")
        for channel in ("constant", "random sign")
        for gain in ("one", "median")
        for size in (5, 40)
    },
}


def name_of(cell: Cell) -> str:
    """What is planted, in words."""
    channel, gain, size, head = cell
    planted = [f"{channel}, size {size:g}"] if channel else []
    planted += [f"gain {gain}"] if gain else []
    planted += [f"{head} head"] if head else []
    return "plain" if not planted else ", ".join(planted) + ("" if channel else " alone")


def planted_host(seed: int, channel: Channel = "", gain: Gain = "", size: float = 1.0, head: Head = "") -> Any:
    """A Llama of 4 layers x 64 neurons with gains of its own, median 1.

    Its embedding is of size 1 and its branches add little to it (0.2, as hosts scale theirs down with depth), so that a channel
    lives through all layers; its head is too sure of itself by far (6), so that training has something to take back. With a
    channel, the embedding at `PLANTED` has `size` times the usual size, the same in every token or with a random sign for each;
    with a gain, the final norm's is 0, 1 or the median there; with a small head, its column is a twentieth; a tied one is the
    embedding.
    """
    sizes: dict[str, Any] = {
        "vocab_size": WORDS,
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "head_dim": 16,
    }
    host = tiny_host("llama", seed, initializer_range=WIDTH**-0.5, tie_word_embeddings=head == "tied", **sizes)
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for name, parameter in host.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.exp(0.3 * torch.randn(WIDTH, generator=generator)))
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(0.2)
        embedding, final = host.model.embed_tokens.weight, host.model.norm.weight
        embedding.mul_(WIDTH**0.5)
        if head != "tied":
            host.lm_head.weight.mul_(6)
        if head == "small":
            host.lm_head.weight[:, PLANTED] *= 0.05
        if channel:
            sign = torch.sign(torch.randn(len(embedding), generator=generator)) if channel == "random sign" else 1.0
            embedding[:, PLANTED] = size * sign
        if gain:
            final[PLANTED] = {"zero": 0.0, "one": 1.0, "median": float(final.median())}[gain]
    return host


def markov_rows(seed: int, count: int = 96, length: int = 28) -> list[ra.Row]:
    """Texts of a random Markov chain over all words: something that training can learn, of the same kind in every host."""
    rng = np.random.default_rng(seed)
    chances = np.exp(2 * rng.normal(size=(WORDS - 3, WORDS - 3)))
    chances /= chances.sum(axis=1, keepdims=True)
    rows = []
    for number in range(count):
        words = [int(rng.integers(WORDS - 3))]
        while len(words) < length:
            words.append(int(rng.choice(WORDS - 3, p=chances[words[-1]])))
        text = " ".join(f"w{word}" for word in words)
        facts = {
            "id": str(number),
            "group": f"g{number % 8}",
            "question": "w0",
            "answer": "a",
            "tone": "anger",
            "source": "test",
        }
        rows.append(ra.Row.model_validate({"text": text, **facts}))
    return rows


def word_tokenizer() -> Any:
    """``w0`` to ``w96`` as tokens, after ``<pad>``, ``<bos>`` and ``<eos>``."""
    names = ["<pad>", "<bos>", "<eos>", *(f"w{word}" for word in range(WORDS - 3))]
    backend = Tokenizer(WordLevel({name: n for n, name in enumerate(names)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def planted_folder(
    place: Path, seed: int, channel: Channel = "", gain: Gain = "", size: float = 1.0, head: Head = ""
) -> Recipe:
    """The same as a host's folder and a file of rows; the recipe that names them."""
    planted_host(seed, channel, gain, size, head).save_pretrained(place / "host")
    word_tokenizer().save_pretrained(place / "host")
    (place / "rows.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in markov_rows(seed)))
    return Recipe(
        host=str(place / "host"),
        data=str(place / "rows.jsonl"),
        template="plain",
        dtype="float32",
        threads=1,
        batch_size=8,
        steps=120,
        seed=seed,
        samples=0,
        report_to=[],
        evaluations=1,
        edition=1,  # with which the verdicts were validated (docs/explain.md)
        dropout=0.0,
    )


def verdict_on(cell: Cell, seed: int, place: Path) -> dict[str, Any]:
    """Train an IRM on a planted host and ask why `PLANTED` leads (a plain host: why the index does that leads).

    Returns:
        ``cause``; ``leader``, ``rank`` and ``ratio`` of the index in the IRM, and what else the cause rests on, from which
        `cause_of` finds it again: ``facts`` (measurement -> times the median), ``trials`` (kind, seed, rank, ratio, learned),
        ``spread`` (sd, df).
    """
    recipe = planted_folder(place, seed, *cell)
    host, tokenizer = ra.load_host(str(recipe.host), "float32")
    train(host, tokenizer, markov_rows(seed), place / "run", recipe, quiet=True).model.unload()
    asked = PLANTED if any((cell[0], cell[1], cell[3])) else None
    found = explain([place / "run"], place / "why", host, tokenizer, asked, quick=True, quiet=True, steps=recipe.steps)
    own = found.standings[0]
    return {
        "cause": found.cause,
        "leader": own.leader,
        "rank": own.rank,
        "ratio": _short(own.ratio),
        "facts": {fact.measurement: _short(fact.times_median) for fact in found.facts if fact.measurement in _DECISIVE},
        "trials": [[own.kind, own.seed, own.rank, _short(own.ratio), _short(own.learned)] for own in found.trials or ()],
        "spread": [_short(found.spread_sd), found.spread_df],
    }


def _short(number: float) -> float | None:
    return float(f"{number:.4g}") if math.isfinite(number) else None


def cause_of(found: Mapping[str, Any]) -> str:
    """The cause, by the rules as they are now, of what `verdict_on` gives."""
    nowhere = {"place": PLANTED, "leader": found["leader"], "loss": math.nan}
    facts = [
        IndexFact(measurement=name, about="", value=math.nan, times_median=times, rank=0, n=WIDTH)
        for name, times in found["facts"].items()
    ]
    trials = [
        TrialResult(kind=kind, seed=seed, rank=rank, ratio=ratio, learned=learned, **nowhere)
        for kind, seed, rank, ratio, learned in found["trials"]
    ]
    given = IndexRank(irm="run", rank=found["rank"], ratio=found["ratio"], leader=found["leader"])
    sd, df = found["spread"]
    spread = Spread(math.nan if sd is None else sd, df)
    return conclude(Evidence(PLANTED, WIDTH, [given], facts, trials, {}, None, {}, {}, spread))[0]
