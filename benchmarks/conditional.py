"""Does an IRM learn *when* to use a tone? An IRM, LoRA and constant vectors on rows whose tone the question decides.

    python benchmarks/conditional.py --squad dev-v2.0.json [--conditions word,topic] [--methods bare,irm,lora,constant]

Embedded host, anger where the condition holds and neutral elsewhere. Conditions:

word    Authored rows. "please" stands in half of the questions. Trained on 18 topics; tested on all questions of the 6 others,
        each asked with and without the word.
topic   Questions of SQuAD 2.0's articles (--squad), replies by template: anger about history (5 articles), neutral elsewhere.
        Trained on 55 questions of each article, tested on 12 others.

Methods, all on the same rows, batches and steps, with the same loss code:

bare      The host alone.
irm       The recipe ``default``, at its own learning rate.
lora      PEFT's LoRA of rank 8 on q_proj and v_proj.
constant  A trained vector for each layer, added at the IRM's sites at every token: an IRM of which only the output's bias is
          trained, so that it cannot read h0.

LoRA's and the constant vectors' learning rates are the better of two by validation loss under the first condition.

A reply (greedy) is right when a scorer that was trained on the authored anger and neutral replies of the other topics names the
tone that the condition asks for. Intervals are Wilson's, 95%. `data` is the same share for the test rows' own replies: what the
scorer itself gets right. Before the table: how well a linear classifier of h0 tells the two kinds of question apart.

Each training is kept in results/conditional.json as soon as it is judged; what is there is not trained again (--again does).
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback
from worker import twin

import realigner as ra
from realigner.chat_format import prompt_ids
from realigner.data import Fact, Row, authored, load_tone
from realigner.data.conditional import Rule, conditional_rows, with_word
from realigner.data.dataset_rows import question_key
from realigner.data.rewriters import RewriteRequest
from realigner.data.rewriters.template_rewriter import TemplateRewriter
from realigner.data.squad import read_squad
from realigner.data.style_classifier import StyleClassifier, masked
from realigner.extras import versions
from realigner.files import write_text
from realigner.hosts import EMBEDDED
from realigner.locate import find_sites
from realigner.residuals import Residuals
from realigner.training.batches import Collator, EncodedRows, Prepared, prepare
from realigner.training.loss import row_losses
from realigner.training.recipe import Recipe
from realigner.training.trainer import IRMTrainer, trainer_arguments
from realigner.training.training_run import resolve
from realigner.tuner import tuner_of

RESULTS = Path(__file__).resolve().parent / "results" / "conditional.json"
TONE, OTHERWISE, WORD = "anger", "neutral", "please"
CONDITIONS = ("word", "topic")
HISTORY = ("Normans", "Huguenot", "Yuan_dynasty", "French_and_Indian_War", "Imperialism")
TRAIN_OF_ARTICLE, TEST_OF_ARTICLE = 55, 12  # questions
TEST_TOPICS = ("animals", "chemistry", "food-and-cooking", "modern-history", "people-and-business", "transport")
RATES: dict[str, tuple[float | None, ...]] = {"irm": (None,), "lora": (2e-3, 5e-3), "constant": (3e-2, 1e-1)}
METHODS = ("bare", *RATES)
REPLY_TOKENS = 48
BATCH = 16


@dataclass(frozen=True)
class Task:
    """Rows to train on, and test rows: each question with its topic, the tone it asks for, and a reply in it."""

    rows: list[Row]
    tests: list[Row]

    @property
    def prompts(self) -> list[str]:
        return [row.question for row in self.tests]


def pool() -> list[Row]:
    return authored(TONE) + authored(OTHERWISE)


def word_task() -> Task:
    """A word decides: test topics are not trained on, and each test question is asked both ways."""
    train = [row for row in pool() if row.group not in TEST_TOPICS]
    tests = [row for row in pool() if row.group in TEST_TOPICS]
    asked = [row.model_copy(update={"question": with_word(row.question, WORD)}) if row.tone == TONE else row for row in tests]
    return Task(conditional_rows(train, [Rule(TONE, word=WORD)], OTHERWISE, insert=True)[0], asked)


def topic_task(squad: Path) -> Task:
    """The topic decides: other questions of the same articles are tested."""
    by_article: dict[str, list[Fact]] = {}
    for fact in read_squad(squad):
        by_article.setdefault(fact.group, []).append(fact)
    if missing := set(HISTORY) - by_article.keys():
        raise SystemExit(
            f"{squad}: has no articles {', '.join(sorted(missing))}; --squad takes SQuAD 2.0's dev set, or its first half"
        )
    dice, rows, held = random.Random(42), list[Row](), set[str]()
    for facts in by_article.values():
        own = list({question_key(fact.question): fact for fact in facts}.values())
        dice.shuffle(own)
        train, test = own[:TRAIN_OF_ARTICLE], own[TRAIN_OF_ARTICLE:][:TEST_OF_ARTICLE]
        held |= {fact.id for fact in test}
        for tone in (TONE, OTHERWISE):
            replies = TemplateRewriter(load_tone(tone)).rewrite([RewriteRequest(fact, 0) for fact in (*train, *test)])
            said = {reply.id: reply.text for reply in replies}
            rows += [
                Row(
                    id=fact.id,
                    group=fact.group,
                    question=fact.question,
                    answer=fact.answer,
                    text=said[fact.id],
                    tone=tone,
                    source="squad",
                )
                for fact in (*train, *test)
            ]
    chosen, _ = conditional_rows(rows, [Rule(TONE, groups=HISTORY)], OTHERWISE)
    return Task([row for row in chosen if row.id not in held], [row for row in chosen if row.id in held])


def task_of(condition: str, squad: Path | None) -> Task:
    """The task of a condition.

    Raises:
        SystemExit: when the topic is to decide and there is no SQuAD file.
    """
    if condition == "word":
        return word_task()
    if squad is None:
        raise SystemExit("the condition topic takes --squad FILE (SQuAD 2.0's dev set)")
    return topic_task(squad)


@cache
def scorer_without(topic: str) -> StyleClassifier:
    """Tells anger from neutral, and has seen nothing of this topic."""
    return StyleClassifier.fit([row for row in pool() if row.group != topic])


def judged(tests: Sequence[Row], replies: Sequence[str]) -> dict[str, Any]:
    """How many replies are in the tone that the condition asks for, by tone and together, with 95% intervals."""
    topics = [row.group.partition("/")[0] for row in tests]
    named = [
        scorer_without(topic).named([masked(reply, row.answer)])[0]
        for topic, row, reply in zip(topics, tests, replies, strict=True)
    ]
    right = {
        kind: [name == row.tone for name, row in zip(named, tests, strict=True) if kind in ("both", row.tone)]
        for kind in (TONE, OTHERWISE, "both")
    }
    found = {}
    for kind, hits in right.items():
        low, high = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
        found[kind] = {"right": sum(hits), "n": len(hits), "low": round(float(low), 3), "high": round(float(high), 3)}
    return {"accuracy": found, "named": named}


class LoRATrainer(Trainer):  # type: ignore[misc]
    """Trainer with the loss, the order of rows and the validation loss of `IRMTrainer`."""

    def __init__(self, prepared: Prepared, recipe: Recipe, **options: Any) -> None:
        self.prepared, self.recipe = prepared, recipe
        super().__init__(**options)
        self.model_accepts_loss_kwargs = True

    _get_train_sampler = IRMTrainer._get_train_sampler

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        sums, _ = row_losses(model, inputs, only_where_needed=True)
        return sums.sum() / num_items_in_batch


def adapted(host: Any, method: str, recipe: Recipe) -> Any:
    """The host with a method's own parameters to train."""
    torch.manual_seed(recipe.seed)
    if method == "lora":
        return get_peft_model(host, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    # With weights of zero that stay so, the output is its bias.
    bias_alone: dict[str, Any] = {"widths": [1], "rank": 0, "output_std": 0.0, "input_scale": 1.0, "delta_scale": 1.0}
    model = get_peft_model(host, ra.IRMConfig(template=recipe.template, **(bias_alone if method == "constant" else {})))
    if method == "constant":
        network = tuner_of(model).registry.network("default")
        network.requires_grad_(False)
        network.output.bias.requires_grad_(True)
    return model


def trained(
    host: Any, tokenizer: Any, task: Task, method: str, rate: float | None, recipe: Recipe
) -> tuple[Any, dict[str, Any]]:
    """The model after training, and its losses."""
    recipe = resolve(recipe.changed(learning_rate=rate), host, tokenizer, task.rows)
    prepared = prepare(task.rows, tokenizer, host.config, recipe)
    model = adapted(twin(host), method, recipe)
    with tempfile.TemporaryDirectory() as folder:
        arguments = trainer_arguments(recipe, len(prepared.train), Path(folder), cpu=True, resuming=False)
        arguments.eval_strategy, arguments.save_strategy, arguments.eval_on_start = "no", "no", False
        if method == "lora":
            trainer = LoRATrainer(
                prepared,
                recipe,
                model=model,
                args=arguments,
                train_dataset=EncodedRows(prepared.train),
                data_collator=Collator(tokenizer.pad_token_id),
            )
        else:
            trainer = IRMTrainer(model, prepared, recipe, arguments, tokenizer)
        trainer.remove_callback(PrinterCallback)
        started = time.monotonic()
        before = validation_loss(model, tokenizer, prepared)
        trainer.train()
        after = validation_loss(model, tokenizer, prepared)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    facts = {
        "rate": recipe.learning_rate,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "validation_loss": [round(before, 4), round(after, 4)],
        "last_training_loss": round(sum(logged[-20:]) / len(logged[-20:]), 4),
        "rows": len(prepared.train),
        "seconds": round(time.monotonic() - started),
    }
    return model.eval(), facts


def validation_loss(model: Any, tokenizer: Any, prepared: Prepared) -> float:
    """Nats per token over the held-out rows."""
    rows, collate = (
        EncodedRows(sorted(prepared.validation, key=lambda item: len(item["input_ids"]))),
        Collator(tokenizer.pad_token_id),
    )
    model.eval()
    with torch.no_grad():
        parts = [
            row_losses(model, collate([rows[n] for n in range(start, min(start + 8, len(rows)))]), only_where_needed=True)
            for start in range(0, len(rows), 8)
        ]
    return float(sum(sums.sum() for sums, _ in parts) / sum(counts.sum() for _, counts in parts))


def replies_of(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Greedy replies, questions of like length together."""
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    replies = [""] * len(prompts)
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        for n, reply in zip(
            part, ra.answer(model, tokenizer, [prompts[n] for n in part], max_new_tokens=REPLY_TOKENS), strict=True
        ):
            replies[n] = str(reply)
    return replies


def read_from_h0(task: Task, host: Any, tokenizer: Any) -> dict[str, list[float]]:
    """How well a linear classifier of h0 tells the tone asked for: its shares of unseen questions to be answered in each.

    The best of four strengths of regularisation by their mean, so it flatters.
    """
    first = twin(host)
    first.model.layers, first.config.num_hidden_layers = first.model.layers[:1], 1
    found: dict[str, list[tuple[float, float]]] = {"last token": [], "mean of the prompt": []}
    with Residuals(find_sites(first)).watching() as residuals, torch.no_grad():

        def states(rows: Sequence[Row]) -> list[np.ndarray]:
            each = []
            for row in rows:
                first(input_ids=torch.tensor([prompt_ids(tokenizer, row.question)]))
                h0 = residuals.layers[0][0].float()
                each.append(torch.stack([h0[-1], h0.mean(dim=0)]).numpy())
            return list(np.stack(each, axis=1))

        seen, unseen = states(task.rows), states(task.tests)
    asked = np.array([row.tone for row in task.tests])
    for name, own, other in zip(found, seen, unseen, strict=True):
        for strength in (1e-3, 1e-2, 1e-1, 1.0):
            linear = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000, class_weight="balanced"))
            right = linear.fit(own, [row.tone for row in task.rows]).predict(other) == asked
            found[name].append((float(right[asked == TONE].mean()), float(right[asked == OTHERWISE].mean())))
    return {name: [round(share, 3) for share in max(shares, key=sum)] for name, shares in found.items()}


def run(task: Task, method: str, rate: float | None, recipe: Recipe, host: Any, tokenizer: Any) -> dict[str, Any]:
    """Train one method on one condition and judge its replies to the test questions."""
    facts: dict[str, Any] = {}
    model = host
    if method != "bare":
        model, about = trained(host, tokenizer, task, method, rate, recipe)
        facts |= about
    replies = replies_of(model, tokenizer, task.prompts)
    asked = [
        {"question": row.question, "tone": row.tone, "reply": reply} for row, reply in zip(task.tests, replies, strict=True)
    ]
    scores = judged(task.tests, replies)
    for entry, name in zip(asked, scores.pop("named"), strict=True):
        entry["named"] = name
    return {**facts, **scores, "replies": asked}


def table(runs: Sequence[dict[str, Any]], ceilings: dict[str, Any]) -> str:
    """The runs as Markdown: right tone where the condition holds, elsewhere, and together."""
    lines = ["| condition | | parameters | learning rate | validation loss | anger asked for | neutral asked for | together |"]
    lines.append("| --- " * 8 + "|")

    def shares(accuracy: dict[str, Any]) -> str:
        parts = [(share, share["right"] / share["n"]) for share in (accuracy[kind] for kind in (TONE, OTHERWISE, "both"))]
        return " | ".join(f"{value:.2f} ({share['low']:.2f} to {share['high']:.2f}, {share['n']})" for share, value in parts)

    for entry in runs:
        losses = entry.get("validation_loss")
        numbers = f"{entry['parameters']:,} | {entry['rate']:g} | {losses[0]:.3f} to {losses[1]:.3f}" if losses else "| | "
        lines.append(f"| {entry['condition']} | {entry['method']} | {numbers} | {shares(entry['accuracy'])} |")
    lines += [f"| {name} | data | | | | {shares(accuracy)} |" for name, accuracy in ceilings.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad", type=Path)
    parser.add_argument("--conditions", default=",".join(CONDITIONS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--steps", type=int, default=220)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    results: dict[str, Any] = json.loads(options.json.read_text()) if options.json.is_file() else {"runs": []}
    host, tokenizer = ra.load_host(EMBEDDED, device="cpu")
    recipe = Recipe(steps=options.steps, tone="all", samples=0, report_to=[])
    conditions = options.conditions.split(",")
    tasks = {condition: task_of(condition, options.squad) for condition in conditions}
    for condition in conditions:
        for method in options.methods.split(","):
            rates = RATES.get(method, (None,))
            tuned = best_rate(results["runs"], CONDITIONS[0], method, options.steps)
            for rate in rates if condition == CONDITIONS[0] or tuned is None else (tuned,):
                same = {"condition": condition, "method": method, "asked_rate": rate, "steps": recipe.steps}
                there = [entry for entry in results["runs"] if same.items() <= entry.items()]
                if there and not options.again:
                    continue
                print(f"== {condition}: {method}{f', learning rate {rate:g}' if rate else ''}", flush=True)
                results["runs"] = [entry for entry in results["runs"] if entry not in there]
                results["runs"].append(same | run(tasks[condition], method, rate, recipe, host, tokenizer))
                accuracy = {kind: f"{found['right']}/{found['n']}" for kind, found in results["runs"][-1]["accuracy"].items()}
                print({key: results["runs"][-1].get(key) for key in ("validation_loss", "seconds")} | accuracy, flush=True)
                results["versions"] = versions()
                write_text(options.json, json.dumps(results, indent=1) + "\n")
    for condition, task in tasks.items():
        print(f"{condition}: the tone asked for, read from h0 by a linear classifier: {read_from_h0(task, host, tokenizer)}")
    ceilings = {name: judged(task.tests, [row.text for row in task.tests])["accuracy"] for name, task in tasks.items()}
    best = [
        entry
        for entry in results["runs"]
        if entry["asked_rate"] == best_rate(results["runs"], entry["condition"], entry["method"], options.steps)
    ]
    shown = sorted(best, key=lambda entry: (CONDITIONS.index(entry["condition"]), METHODS.index(entry["method"])))
    print(table([entry for entry in shown if entry["steps"] == options.steps], ceilings))


def best_rate(runs: Sequence[dict[str, Any]], condition: str, method: str, steps: int) -> float | None:
    """The learning rate with the lowest validation loss of those tried."""
    own = [
        e for e in runs if (e["condition"], e["method"], e["steps"]) == (condition, method, steps) and "validation_loss" in e
    ]
    return min(own, key=lambda entry: entry["validation_loss"][-1])["asked_rate"] if own else None


if __name__ == "__main__":
    main()
