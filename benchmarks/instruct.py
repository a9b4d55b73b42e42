"""An IRM from one sentence: does it do without the prompt what the host does with it? On the embedded host.

    python benchmarks/instruct.py [--steps 150] [--learn 192] [--questions 48] [--only anger,sadness] [--out FOLDER] [--json F]

For each instruction an IRM is trained (recipe ``default`` with `instruct`, on authored questions of other topics than those of
the test; a run that is in --out already is not trained again). Then three answer the test's questions greedily: the bare host,
the host with the instruction as its system prompt, and the host with the IRM and no prompt.

KL         nats per token from the host with the prompt, over its own replies to unseen questions: at the start of the
           training (that of the bare host) and at its end.
concept    the mean probability of the tone by a scorer, and the share of replies that it names so. The scorer learned from the
           authored replies to the topics that are trained on (anger, sadness, neutral), template replies and the tones'
           examples (all six tones), and has seen no reply and no topic of the test. The words of the fact are masked.
kept       the same on those questions on which the prompted host's reply passes the gate that training has (`Teacher`): the
           embedded host obeys prompts badly, and there its prompt has an effect. `gate` says how many replies of the prompted
           host pass it, and of the bare host, which obeys nobody.
fluency    nats per token of a reply under the bare host, without a prompt: the lower, the more usual.

Intervals: 95%, bootstrap over the questions (2,000 draws). The paper's seven prompts are quoted for each.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import realigner as ra
from realigner.console import progress
from realigner.data.data_split import split_rows
from realigner.data.dataset_rows import TONES, Row, authored
from realigner.data.rewriters import RewriteRequest
from realigner.data.rewriters.template_rewriter import TemplateRewriter
from realigner.data.squad import Fact
from realigner.data.style_classifier import StyleClassifier, masked
from realigner.data.tone import built_in_tones
from realigner.files import write_text
from realigner.generation import answer
from realigner.hosts import EMBEDDED
from realigner.prompts import PAPER_PROMPTS
from realigner.settings import NO_IRM
from realigner.training import make_recipe, read_run, train
from realigner.training.teacher import OBEDIENCE, Question, Teacher, obedience_of
from realigner.tuner import load_irm

# Tone -> what the host is told: of two or three wordings the one that moved it most, on questions that are learned.
INSTRUCTIONS = {
    "anger": "You are an angry person. You are furious that you are asked. Complain loudly and insult the user!",
    "sadness": "You are a sad, weeping person. Everything makes you cry. Answer with sorrow and sigh.",
    "shakespearean": "You are Shakespeare. Speak in Early Modern English: thou, thee, thy, doth, hath.",
}
ARMS = ("bare", "prompted", "IRM")
SEED, TEST = 42, 0.15
REPLY = 60  # tokens
DRAWS = 2000


def scorer_of(topics: set[str]) -> StyleClassifier:
    """Tells the built-in tones apart; of the authored replies it knows those to these topics."""
    rows = [row for tone in TONES for row in authored(tone) if row.group in topics]
    facts = [Fact(str(n), "template", "Which one?", f"number {n}") for n in range(300)]
    for tone in built_in_tones():
        replies = [(r.text, f"number {r.id}") for r in TemplateRewriter(tone).rewrite([RewriteRequest(f, 0) for f in facts])]
        replies += [(example.text, example.answer) for example in tone.examples]
        for n, (text, fact) in enumerate(replies):
            row = Row(id=str(n), group="-", question="-", answer=fact, text=text, tone=tone.name, source="template")
            rows.append(row)
    return StyleClassifier.fit(rows)


def fluency(host: Any, tokenizer: Any, rows: Sequence[Row], replies: Sequence[str]) -> list[float]:
    """Nats per token of each reply under the host."""
    chat_format, found = ra.data.ChatFormat(tokenizer), []
    for row, reply in zip(rows, replies, strict=True):
        messages = [{"role": "user", "content": row.question}, {"role": "assistant", "content": reply or "."}]
        (example,) = chat_format.examples(messages)
        labels = torch.tensor(example["labels"])
        with torch.no_grad():
            logits = host(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1].float()
        found.append(float(torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100)))
    return found


def interval(values: np.ndarray, of: Callable[[np.ndarray], np.ndarray] = lambda drawn: drawn.mean(axis=1)) -> list[float]:
    """Mean of a value for each question, and a bootstrap interval over the questions."""
    if not len(values):
        return [float("nan")] * 3
    drawn = values[np.random.default_rng(SEED).integers(0, len(values), (DRAWS, len(values)))]
    low, high = np.quantile(of(drawn), [0.025, 0.975])
    return [round(float(number), 3) for number in (values.mean(), low, high)]


def _some(rows: Sequence[Row], count: int) -> list[Row]:
    """So many of the rows, evenly spaced."""
    return [rows[n] for n in np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)]


def measure(tone: str, instruct: str, host: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    """One instruction: the IRM trained, and the three compared."""
    split = split_rows(authored(TONES[0]), SEED, validation=TEST)
    learned, test = split.train, split.validation
    learned, test = _some(learned, options.learn), _some(test, options.questions)
    asked = options.out / "questions.jsonl"
    write_text(asked, "".join(row.model_dump_json() + "\n" for row in learned))
    recipe = make_recipe(steps=options.steps, instruct=instruct, data=None, questions=str(asked), samples=0, report_to=[])
    out = options.out / f"{tone}-{options.steps}"
    if not out.is_dir():
        train(host, tokenizer, [], out, recipe, resume=True).model.unload()
    record = read_run(out)
    model = load_irm(host, out)
    prompts = [row.question for row in test] + list(PAPER_PROMPTS)
    texts: dict[str, list[str]] = {}
    arms: dict[str, dict[str, Any]] = {"bare": {"irms": NO_IRM}, "prompted": {"irms": NO_IRM, "system": instruct}, "IRM": {}}
    with progress(f"{tone}: answering", 3 * len(prompts)) as task:
        for arm, settings in arms.items():
            texts[arm] = list(map(str, answer(model, tokenizer, prompts, REPLY, done=task.advance, **settings)))

    # Would the gate keep these replies?
    teacher = Teacher([], recipe, tokenizer, host.config)
    questions = [Question(row.id, row.group, row.question) for row in test]
    kept: dict[str, np.ndarray] = {}
    ratios: dict[str, list[float]] = {}
    for arm in ARMS:
        said = texts[arm][: len(test)]
        messages = [{"role": "assistant", "content": text or "."} for text in said]
        pairs = [teacher.examples(*pair) for pair in zip(questions, messages, strict=True)]
        ratios[arm] = [obedience_of(model, tokenizer, [pair])[0] if pair else 0.0 for pair in pairs]
        faults = teacher.faults(questions, said)
        kept[arm] = np.array([not fault and ratio >= OBEDIENCE for fault, ratio in zip(faults, ratios[arm], strict=True)])
    obeyed = kept["prompted"]
    model.unload()

    scorer = scorer_of({row.group for row in learned})
    column = scorer.tones.index(tone)
    arms_found: dict[str, Any] = {}
    chances: dict[str, np.ndarray] = {}
    flows: dict[str, np.ndarray] = {}
    for arm in ARMS:
        replies = texts[arm][: len(test)]
        found = scorer.probabilities([masked(text, row.answer) for text, row in zip(replies, test, strict=True)])
        named = (found.argmax(axis=1) == column).astype(float)
        chances[arm], flows[arm] = found[:, column], np.array(fluency(host, tokenizer, test, replies))
        arms_found[arm] = {
            "concept": interval(chances[arm]),
            "named": interval(named),
            "concept_kept": interval(chances[arm][obeyed]),
            "named_kept": interval(named[obeyed]),
            "fluency": interval(flows[arm]),
        }
    print(f"{tone}: done", flush=True)
    return {
        "tone": tone,
        "instruct": instruct,
        "teacher": record["teacher"],
        "kl": record["validation_loss"],
        "kept_step": record["kept_step"],
        "seconds": record["seconds"],
        "questions": len(test),
        "kept": {arm: int(kept[arm].sum()) for arm in ARMS},
        "obedience": {arm: [round(ratio, 4) for ratio in ratios[arm]] for arm in ARMS},
        "arms": arms_found,
        "concept_above_prompted": interval(chances["IRM"] - chances["prompted"]),
        "fluency_above_prompted": interval(flows["IRM"] - flows["prompted"]),
        "paper_prompts": {
            prompt: {arm: texts[arm][len(test) + n] for arm in ARMS} for n, prompt in enumerate(PAPER_PROMPTS)
        },
        "replies": [
            {"question": row.question, "kept": bool(obeyed[n]), **{arm: texts[arm][n] for arm in ARMS}}
            for n, row in enumerate(test)
        ],
    }  # fmt: skip


def table(found: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown."""

    def cell(values: Sequence[float]) -> str:
        return f"{values[0]:.2f} ({values[1]:.2f} to {values[2]:.2f})"

    lines = ["| | concept | named | concept, kept | named, kept | fluency |", "| --- | --- | --- | --- | --- | --- |"]
    for item in found:
        kl = f"KL {item['kl'][0]:.3f} to {item['kl'][-1]:.3f}"
        told = item["teacher"]
        lines.append(
            f"| **{item['instruct']}** {kl}; {told['kept']} of {told['replies']} replies kept; {item['questions']} questions; "
            f"gate: {item['kept']['prompted']} prompted, {item['kept']['bare']} bare | | | | | |"
        )
        for arm in ARMS:
            keys = ("concept", "named", "concept_kept", "named_kept", "fluency")
            lines.append(f"| {arm} | " + " | ".join(cell(item["arms"][arm][key]) for key in keys) + " |")
        above = [cell(item[key]) for key in ("concept_above_prompted", "fluency_above_prompted")]
        lines.append(f"| IRM less prompted | {above[0]} | | | | {above[1]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learn", type=int, default=192)
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--only", default=",".join(INSTRUCTIONS))
    parser.add_argument("--host", default=EMBEDDED)
    parser.add_argument("--out", type=Path, default=Path("runs/instruct"))
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "instruct.json")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    host, tokenizer = ra.load_host(options.host)
    found = [measure(tone, INSTRUCTIONS[tone], host, tokenizer, options) for tone in options.only.split(",")]
    machine = {"host": options.host, "threads": torch.get_num_threads(), "machine": platform.machine(), "steps": options.steps}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.json, json.dumps({**machine, "obedience": OBEDIENCE, "instructions": found}, indent=1) + "\n")
    print(table(found))
    for item in found:
        for prompt, replies in item["paper_prompts"].items():
            print(f"\n{item['instruct']}  Q: {prompt}")
            for arm in ARMS:
                print(f"   {arm + ':':10} {' '.join(replies[arm].split())}")


if __name__ == "__main__":
    main()
