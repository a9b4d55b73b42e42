"""The host rewriter on tiny hosts: sampling against its distribution, seeds, batches, and hosts of every manner."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from scipy import stats

from realigner.data import Fact, Tone, load_tone
from realigner.data.build_dataset import build
from realigner.data.quality_filter import QualityFilter
from realigner.data.rewriters import RewriteRequest, messages
from realigner.data.rewriters.host_rewriter import HostRewriter, SeededSampling
from realigner.errors import RealignerError, UsageError
from tests.tiny import tiny_pair, tiny_tokenizer

TONE = Tone(name="plain", language="any", instruction="Say it.", examples=())
FACTS = [Fact(str(n), "g", f"What is {'x' * (n % 7)} {n}?", f"it is {n}") for n in range(10)]
ASKS = [RewriteRequest(fact, 0) for fact in FACTS]
SIZES = {"max_new_tokens": 12, "batch_size": 4}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return tiny_pair(max_position_embeddings=2048)


def texts(rewriter: HostRewriter, requests: list[RewriteRequest]) -> dict[tuple[str, int], str]:
    got = [((reply.id, reply.attempt), reply.text) for reply in rewriter.rewrite(requests)]
    assert len(got) == len(dict(got)) == len(requests)
    return dict(got)


@pytest.mark.slow
def test_replies_do_not_depend_on_the_batch(pair: tuple[Any, Any]) -> None:
    """Together, one at a time, in other batches, a second time: the same; another seed or attempt: others."""
    together = texts(HostRewriter(*pair, TONE, **SIZES), ASKS)
    assert together == texts(HostRewriter(*pair, TONE, **SIZES), ASKS[::-1])
    assert together == texts(HostRewriter(*pair, TONE, max_new_tokens=12, batch_size=10), ASKS)
    alone = HostRewriter(*pair, TONE, **SIZES)
    assert {key: text for request in ASKS[:4] for key, text in texts(alone, [request]).items()}.items() <= together.items()
    assert texts(HostRewriter(*pair, TONE, seed=1, **SIZES), ASKS) != together
    again = texts(HostRewriter(*pair, TONE, **SIZES), [RewriteRequest(fact, 1) for fact in FACTS])
    assert not set(again.values()) & set(together.values())


def test_greedy_is_generate() -> None:
    host, tokenizer = tiny_pair("gpt_neox", max_position_embeddings=2048, initializer_range=0.5)
    got = texts(HostRewriter(host, tokenizer, TONE, temperature=0, **SIZES), ASKS)
    for request in ASKS:
        text = tokenizer.apply_chat_template(messages(TONE, request.fact), tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        tokens = host.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        want = " ".join(tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True).split())
        assert got[request.fact.id, 0] == want
    assert len(set(got.values())) >= 5  # so that a mix-up would show


@pytest.mark.parametrize(("temperature", "top_p", "vocabulary"), [(1.0, 1.0, 50), (0.9, 0.7, 500), (2.0, 0.5, 50)])
def test_sampling_has_the_right_distribution(temperature: float, top_p: float, vocabulary: int) -> None:
    """20,000 seeds against the nucleus computed in the plain way: chi-squared, and nothing outside the nucleus."""
    scores = torch.randn(vocabulary, generator=torch.Generator().manual_seed(4)) * 2
    order = (scores / temperature).softmax(-1).sort(descending=True)
    before = order.values.cumsum(-1) - order.values
    want = torch.zeros(vocabulary).scatter(0, order.indices, order.values * (before < top_p))
    want = want.double() / want.double().sum()
    sampling = SeededSampling(temperature, top_p)
    seeds = torch.arange(20_000, dtype=torch.int32)
    drawn = sampling(scores.repeat(len(seeds), 1), seeds).argmax(-1)
    counts = torch.bincount(drawn, minlength=vocabulary).double()
    assert counts[want == 0].sum() == 0
    usual = want * len(seeds) >= 5
    expected = want[usual] / want[usual].sum() * counts[usual].sum()
    assert stats.chisquare(counts[usual].numpy(), expected.numpy()).pvalue > 1e-3


def test_never_beyond_the_sixty_four_likeliest() -> None:
    flat = torch.zeros(2000, 300)
    flat[:, :64] += 0.01
    drawn = SeededSampling(1.0, 1.0)(flat, torch.arange(2000, dtype=torch.int32)).argmax(-1)
    assert drawn.max() < 64
    assert len(set(drawn.tolist())) == 64


@pytest.mark.parametrize("family", ["mpt", "gptj", "falcon"])
def test_hosts_that_continuous_batching_gets_wrong_are_refused(family: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Other tokens than alone, or none: one line, and nothing printed by others."""
    host, tokenizer = tiny_pair(family)
    with pytest.raises(RealignerError, match="continuous batch") as caught:
        list(HostRewriter(host, tokenizer, TONE, **SIZES).rewrite(ASKS))
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err


def test_two_asks_of_one_fact_and_a_dense_prompt(pair: tuple[Any, Any]) -> None:
    dense = Fact("dense", "g", "川" * 60, "日本")
    requests = [
        RewriteRequest(FACTS[0], 0),
        RewriteRequest(FACTS[0], 1),
        RewriteRequest(dense, 0),
        RewriteRequest(Fact("long", "g", "x" * 150, "y"), 0),
    ]
    assert set(texts(HostRewriter(*pair, TONE, max_new_tokens=4, batch_size=1), requests)) == {
        ("0", 0), ("0", 1), ("dense", 0), ("long", 0),
    }  # fmt: skip


def test_counts_and_notes(pair: tuple[Any, Any]) -> None:
    rewriter = HostRewriter(*pair, TONE, **SIZES)
    assert rewriter.note() == ""
    replies = list(rewriter.rewrite(ASKS))
    assert all(reply.tokens_in > 20 and 1 <= reply.tokens_out <= 12 for reply in replies)
    assert rewriter.note() == f"{sum(reply.tokens_out for reply in replies):,} tokens written"
    assert list(rewriter.rewrite([])) == []


def test_closing_stops_the_work(pair: tuple[Any, Any]) -> None:
    """At once: the texts under way, hundreds of tokens each, are not finished first."""
    before, steps = threading.active_count(), 0

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1

    handle = pair[0].register_forward_hook(count)
    replies = HostRewriter(*pair, TONE, max_new_tokens=600, batch_size=4).rewrite(ASKS)
    next(replies)
    at_close = steps
    replies.close()
    handle.remove()
    assert steps <= at_close + 3
    assert threading.active_count() == before


@pytest.mark.parametrize("chat", ["none", "no system role"])
def test_other_templates(pair: tuple[Any, Any], chat: str) -> None:
    tokenizer = tiny_tokenizer(chat=chat != "none")
    if chat != "none":
        refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        tokenizer.chat_template = refusal + tokenizer.chat_template
    anger = load_tone("anger")
    rewriter = HostRewriter(pair[0], tokenizer, anger, **SIZES)
    prompt = tokenizer.decode(rewriter._prompt(ASKS[0]))
    for part in (anger.instruction, anger.examples[0].text, FACTS[0].question):
        assert part in prompt
    assert set(texts(rewriter, ASKS[:2])) == {("0", 0), ("1", 0)}


@pytest.mark.proof
@pytest.mark.parametrize(
    "family", ["gpt2", *(pytest.param(family, marks=pytest.mark.slow) for family in ("gpt_neox", "gemma2"))]
)
def test_other_families(family: str) -> None:
    pair = tiny_pair(family, max_position_embeddings=2048) if family != "gpt2" else tiny_pair(family, n_positions=2048)
    together = texts(HostRewriter(*pair, TONE, **SIZES), ASKS[:4])
    alone = HostRewriter(*pair, TONE, **SIZES)
    assert together == {key: text for request in ASKS[:4] for key, text in texts(alone, [request]).items()}


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_p": 0}, {"max_new_tokens": 0}, {"batch_size": 0}, {"examples": -1}])
def test_bad_numbers(pair: tuple[Any, Any], bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(bad))}: .* out of range"):
        HostRewriter(*pair, TONE, **bad)


@pytest.mark.proof
def test_a_build_on_a_host(pair: tuple[Any, Any], tmp_path: Any) -> None:
    """A tiny random host says nothing sensible, and the gate says so; every fact is accounted for all the same."""
    gate = QualityFilter(TONE, min_words=0)
    gate.alone = lambda pairs: ["" if len(text) % 2 else "fact lost" for _, text in pairs]  # type: ignore[method-assign]
    built = build(FACTS, TONE, HostRewriter(*pair, TONE, **SIZES), tmp_path / "rows.jsonl", gate, quiet=True)
    assert built.rows + built.rejected == 10
    assert built.tokens_out > 0
