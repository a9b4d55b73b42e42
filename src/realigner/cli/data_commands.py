"""Commands on data: build, import, condition, check, tones, scorer."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from typer import Argument, Context, Option

from realigner.cli.options import Force, Json, Seed, TemplateKwargs, Trust, claim, print_json, short, template_kwargs
from realigner.console import program, show, show_table
from realigner.errors import RealignerError, UsageError

if TYPE_CHECKING:
    from realigner.data import Fact, Row
    from realigner.data.rewriters import Rewriter

app = typer.Typer(help="Tone datasets: make, import and check them.", no_args_is_help=True)

REWRITERS = ("template", "host", "openai")
ToneName = Annotated[str, Option(help="A built-in tone (see: realigner data tones), or a TOML file.")]
Squad = Annotated[Path, Option(help="A SQuAD file: JSON of 1.1 or 2.0, or rows (JSON, JSONL, Parquet).")]
_TURNS_SHOWN = 6  # messages before a reply
on_host = partial(Option, rich_help_panel="Rewriter host")
on_endpoint = partial(Option, rich_help_panel="Rewriter openai")


@app.command()
def build(
    context: Context,
    squad: Squad,
    tone: ToneName,
    rewriter: Annotated[str, Option(help="template (offline), host, or openai (an endpoint).")] = "template",
    out: Annotated[Optional[Path], Option(help="The JSONL file; TONE.jsonl by default.")] = None,
    sample: Annotated[Optional[int], Option(help="Only so many questions, drawn by the seed.", min=1)] = None,
    attempts: Annotated[int, Option(help="Maximum replies requested per question.", min=1, max=100)] = 3,
    give_up: Annotated[bool, Option("--give-up", help="Finish without questions that get no reply.")] = False,
    scorer: Annotated[Optional[Path], Option(help="A scorer (data scorer) that judges the tone.")] = None,
    temperature: Annotated[float, Option(help="Sampling temperature; host and openai.", min=0, max=10)] = 0.9,
    top_p: Annotated[float, Option(help="Nucleus sampling; host and openai.", min=0, max=1)] = 0.7,
    max_new_tokens: Annotated[int, Option(help="Tokens of a reply; host and openai.", min=1)] = 120,
    host: Annotated[str, on_host(help="The embedded default, a hub id, a folder, or a .gguf file.")] = "smollm2-135m-instruct",
    batch_size: Annotated[int, on_host(help="Replies at a time.", min=1)] = 32,
    dtype: Annotated[str, on_host(help="float32, bfloat16, float16, or auto.")] = "auto",
    device: Annotated[str, on_host(help="cpu, cuda, cuda:1, ..., or auto.")] = "auto",
    trust_remote_code: Trust = False,
    endpoint: Annotated[Optional[str], on_endpoint(help="Base URL, e.g. http://127.0.0.1:8000/v1.")] = None,
    model: Annotated[Optional[str], on_endpoint(help="The endpoint's model.")] = None,
    concurrency: Annotated[int, on_endpoint(help="Requests at a time.", min=1)] = 8,
    requests_per_minute: Annotated[Optional[int], on_endpoint(help="Limit on requests per minute.", min=1)] = None,
    timeout: Annotated[float, on_endpoint(help="Seconds to wait for a reply.")] = 60.0,
    retries: Annotated[int, on_endpoint(help="Retries of a failed request.", min=0)] = 5,
    price_in: Annotated[Optional[float], on_endpoint(help="Dollars per million tokens read.")] = None,
    price_out: Annotated[Optional[float], on_endpoint(help="Dollars per million tokens written.")] = None,
    key_env: Annotated[str, on_endpoint(help="Environment variable that holds the key.")] = "OPENAI_API_KEY",
    seed: Seed = 42,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Rewrite SQuAD's answers in a tone. If it is interrupted, run the same command again to resume."""
    if rewriter not in REWRITERS:
        raise UsageError(f"--rewriter: there is no {rewriter!r}; choose from {', '.join(REWRITERS)}")
    from realigner.data import load_tone
    from realigner.data.build_dataset import build as run_build, build_place

    chosen = load_tone(tone)
    out = out or Path(f"{chosen.name}.jsonl")
    claim(context, build_place(out, force))
    facts, skipped, about = _facts(squad, sample, seed)
    sampling: dict[str, Any] = {"seed": seed, "temperature": temperature, "top_p": top_p}
    made: Rewriter
    if rewriter == "template":
        from realigner.data.rewriters.template_rewriter import TemplateRewriter

        made = TemplateRewriter(chosen, seed)
    elif rewriter == "host":
        from realigner.data.rewriters.host_rewriter import HostRewriter
        from realigner.hosts import load_host

        loaded, tokenizer = load_host(host, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        sampling |= {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        made = HostRewriter(loaded, tokenizer, chosen, **sampling)
    else:
        if model is None:
            raise UsageError("--model is needed with --rewriter openai: the endpoint's name of the model")
        from realigner.data.rewriters.endpoint_rewriter import EndpointRewriter

        sampling |= {"max_tokens": max_new_tokens, "concurrency": concurrency, "requests_per_minute": requests_per_minute}
        sampling |= {"timeout": timeout, "retries": retries, "price_in": price_in, "price_out": price_out, "key_env": key_env}
        made = EndpointRewriter(chosen, endpoint, model, **sampling)
        about["endpoint"] = made.endpoint
    from realigner.data.quality_filter import QualityFilter
    from realigner.data.style_classifier import StyleClassifier

    checks = QualityFilter(chosen, None if scorer is None else StyleClassifier.load(scorer))
    if scorer is not None:
        from realigner.data.squad import file_sha256

        about["scorer_sha256"] = file_sha256(scorer)
    try:
        built = run_build(facts, chosen, made, out, checks, attempts, about=about, give_up=give_up, force=force, quiet=as_json)
    except KeyboardInterrupt:
        raise RealignerError("interrupted; the replies so far are kept: run the same command again to resume") from None
    if as_json:
        print_json({**built.to_dict(), "skipped": skipped, "facts": len(facts)})
        return
    show(f"{built.path}: {built.rows} rows of {len(facts)} questions in {built.seconds:.0f} s")
    if built.rejected:
        show(f"{built.rejected_path}: {built.rejected} without a good reply")
    _print_reasons(built.reasons, built.replies)
    if skipped:
        show(f"skipped: {_listed(skipped)}")
    if note := made.note():
        show(note)
    show(f"Try next:  {program()} data check {quote(str(built.path))}")


@app.command("import")
def import_(
    context: Context,
    source: Annotated[str, Argument(help="CSV, JSONL, JSON or Parquet file, a dataset's folder, or its hub id.")],
    out: Annotated[Optional[Path], Option(help="The JSONL file to write.")] = None,
    tone: Annotated[Optional[str], Option(help="Tone of all rows, whatever the data says; may be a tone's TOML file.")] = None,
    columns: Annotated[
        Optional[list[str]], Option("--map", help="FIELD=COLUMN, e.g. question=prompt or messages=chat; may be repeated.")
    ] = None,
    form: Annotated[
        Optional[str],
        Option(help="question-text, messages, sharegpt, prompt-completion or alpaca; by default detected from the columns."),
    ] = None,
    split: Annotated[Optional[str], Option(help="Split of a Hugging Face dataset; all by default.")] = None,
    squad: Annotated[Optional[Path], Option(help="The SQuAD file the questions come from.")] = None,
    check_replies: Annotated[bool, Option("--gate/--no-gate", help="Reject bad replies, with a reason.")] = True,
    to_hf: Annotated[
        Optional[Path], Option(help="Also write a Hugging Face DatasetDict: train, validation, test, split by group.")
    ] = None,
    validation: Annotated[float, Option(help="Share of rows for validation in --to-hf.", min=0, max=0.9)] = 0.05,
    test: Annotated[float, Option(help="Share of rows for test in --to-hf.", min=0, max=0.9)] = 0.05,
    seed: Seed = 42,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Read someone else's dataset: the paper's CSV, a table of questions and replies, chats, a Hugging Face dataset."""
    if out is None and to_hf is None:
        raise UsageError("import: nothing to write; give --out F.jsonl, --to-hf DIR, or both")
    from realigner.data.build_dataset import beside, rows_place
    from realigner.data.dataset_rows import question_key
    from realigner.data.importing import DATASET, import_rows, parse_mapping, to_hf as write_hf
    from realigner.data.quality_filter import filter_rows
    from realigner.data.tone import load_tone
    from realigner.files import taken

    mapping = parse_mapping(columns or [])
    place = None if out is None else claim(context, rows_place(out, force))
    if to_hf is not None:
        claim(context, taken(to_hf, DATASET, force))
    own = load_tone(tone) if tone is not None and tone.endswith(".toml") else None
    facts = None if squad is None else _facts(squad, None, seed)[0]
    imported = import_rows(source, own.name if own else tone, mapping, split, facts, form=form)
    rows, rejected = imported.rows, imported.rejected
    known = {question_key(fact.question) for fact in facts or ()}
    found = sum(question_key(row.question) in known for row in rows) if known else None
    if check_replies:
        rows, bad = filter_rows(rows, own)
        rejected = [*rejected, *bad]
    kinds = (re.sub(r" (?:by )?(?:'.*'|\S+:\d+)", "", item["reason"]) for item in rejected)  # a name is not a kind
    reasons = dict(Counter(kinds).most_common())
    if not rows:
        raise RealignerError(f"{source}: no row is left ({_listed(reasons)}); nothing was written")
    splits = {} if to_hf is None else write_hf(rows, to_hf, seed, validation, test, force)
    if place is not None:
        place.write(rows, rejected)
    if as_json:
        counts = {"rows": len(rows), "rejected": len(rejected), "reasons": reasons}
        print_json({"path": None if out is None else str(out), **counts, "splits": splits, "found": found})
        return
    show(f"{source}: {len(rows)} rows, {len(rejected)} rejected")
    if found is not None:
        show(f"{squad}: has {found} of the {len(imported.rows)} questions" + ("" if found else "; is it the right file?"))
    _print_reasons(reasons, len(rows) + len(rejected))
    if splits:
        show(f"{to_hf}: {_listed(splits)} rows")
    if out is not None:
        show(f"{out}" + (f", and what was rejected in {beside(out, '.rejected.jsonl')}" if rejected else ""))
        show(f"Try next:  {program()} data check {quote(str(out))}")


@app.command()
def condition(
    context: Context,
    paths: Annotated[
        list[str], Argument(help="JSONL files of rows that answer the same questions in several tones; or 'authored'.")
    ],
    when: Annotated[
        list[str], Option(help="TONE:group=NAME,NAME or TONE:word=WORD; may be repeated, the first rule that holds counts.")
    ],
    out: Annotated[Path, Option(help="The JSONL file to write.")],
    otherwise: Annotated[str, Option(help="The tone where no rule holds.")] = "neutral",
    insert: Annotated[
        bool, Option("--insert", help="Put the rule's word into half of the questions (two words: two thirds).")
    ] = False,
    seed: Seed = 42,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Rows of several tones in which the question decides the tone (by its group, or by a word), for a conditional IRM."""
    from realigner.data import TONES, authored, read_rows
    from realigner.data.conditional import conditional_rows, parse_rule
    from realigner.data.dataset_rows import ROWS, tone_label
    from realigner.files import taken

    rules = [parse_rule(text) for text in when]
    place = claim(context, taken(out, ROWS, force))
    rows: list[Row] = []
    for path in paths:
        rows += [row for name in TONES for row in authored(name)] if path == "authored" else read_rows(path)
    chosen, missing = conditional_rows(rows, rules, otherwise, insert, seed)
    place.write("".join(row.model_dump_json() + "\n" for row in chosen))
    counts = Counter(row.tone for row in chosen)
    if as_json:
        print_json({"path": str(out), "rows": len(chosen), "tones": counts, "missing": missing})
        return
    show(f"{out}: {len(chosen):,} rows ({_listed(counts)})")
    if missing:
        show(f"left out: {missing:,} questions without a row in the tone that the rules give them")
    show(f"Try next:  {program()} train --data {quote(str(out))} --tone all --out {quote(f'runs/{tone_label(chosen)}')}")


@app.command()
def check(
    context: Context,
    path: Annotated[str, Argument(help="A JSONL file of rows, or 'authored'.")],
    tone: Annotated[Optional[str], Option(help="Only the rows of this tone.")] = None,
    host: Annotated[
        Optional[str], Option(help="Whose tokens to count; the embedded host's by default.", show_default=False)
    ] = None,
    chat_template_kwargs: TemplateKwargs = None,
    against: Annotated[Optional[Path], Option(help="Rows of another tone, to tell this one from.")] = None,
    html: Annotated[Optional[Path], Option(help="Also write a page with histograms.")] = None,
    seed: Seed = 42,
    trust_remote_code: Trust = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Report card of a tone dataset; exit code 1 when it is unfit."""
    from realigner.data import TONES, authored, check_rows, read_rows
    from realigner.files import taken

    if html is not None:
        from realigner.report.dataset_card import CARD, write_card

        claim(context, taken(html, CARD, force))
    authored_tones = [tone] if tone else TONES
    rows = [row for name in authored_tones for row in authored(name)] if path == "authored" else read_rows(path, tone)
    others = read_rows(against) if against else []
    variables = template_kwargs(chat_template_kwargs)
    card = check_rows(rows, *_tokenizer(host, trust_remote_code), others, seed, host is not None, variables)
    if html is not None:
        write_card(card, str(path), html, force)
    if as_json:
        print_json(card.to_dict())
    else:
        show_table(card.lines(), bold_first=True)
        show("\nTen rows to read:" if len(card.samples) == 10 else "\nRows to read:")
        for row in card.samples:
            for line in _lines_of(row):
                show(line)
        show()
        if html is not None:
            show(f"Page: {html}   (open it in a browser)")
    if not card.fit:
        raise RealignerError(f"{path}: unfit: {'; '.join(card.problems)}")
    if not as_json:
        several = ", one tone at a time (--tone)" + ("" if path == "authored" else " or all of them (--tone all)")
        show("fit to train on" + (several if len(card.tones) > 1 else ""))
        if path != "authored":
            tone = next(iter(card.tones))
            one = f" --tone {quote(tone)}" if len(card.tones) > 1 else ""
            show(f"Try next:  {program()} train --data {quote(path)}{one} --out {quote(f'runs/{tone}')}")


@app.command()
def tones(as_json: Json = False) -> None:
    """The built-in tones."""
    from realigner.data import built_in_tones
    from realigner.data.tone import facts_of

    facts = [facts_of(tone) for tone in built_in_tones()]
    if as_json:
        print_json({"tones": facts})
        return
    header = ("tone", "words", "examples", "template replies", "instruction")
    rows = []
    for tone in facts:
        replies = f"{tone['template_replies']:,}" if tone["template_replies"] else "none"
        rows.append((tone["name"], str(tone["words"]), str(tone["examples"]), replies, short(tone["instruction"], 90)))
    show_table(rows, header)
    show("\nYour own: a TOML file in the same form, e.g. --tone mine.toml (docs/data.md shows one).")


@app.command()
def scorer(
    context: Context,
    paths: Annotated[list[str], Argument(help="JSONL files of rows, of two tones or more; or 'authored'.")],
    out: Annotated[Path, Option(help="The scorer, a .skops file.")],
    seed: Seed = 42,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train a scorer that tells tones apart, for data build --scorer; says how well it does on groups it has not seen."""
    from realigner.data import TONES, authored, read_rows
    from realigner.data.style_classifier import SCORER, cross_validated
    from realigner.files import taken

    claim(context, taken(out, SCORER, force))
    rows: list[Row] = []
    for path in paths:
        rows += [row for name in TONES for row in authored(name)] if path == "authored" else read_rows(path)
    made, probabilities = cross_validated(rows, seed=seed)
    named = [made.tones[n] for n in probabilities.argmax(axis=1)]
    right = {tone: [name == tone for name, row in zip(named, rows, strict=True) if row.tone == tone] for tone in made.tones}
    shares = {tone: sum(hits) / len(hits) for tone, hits in right.items()}
    made.save(out, force)
    if as_json:
        counts = {tone: len(hits) for tone, hits in right.items()}
        print_json({"scorer": str(out), "tones": made.tones, "rows": counts, "right": shares})
        return
    show(f"{out}: named correctly, on groups it has not seen:")
    for tone, share in shares.items():
        show(f"  {tone:<16} {100 * share:5.1f}% of {len(right[tone]):,} rows")


def _facts(squad: Path, sample: int | None, seed: int) -> tuple[list[Fact], dict[str, int], dict[str, Any]]:
    """The facts of a file, or so many of them drawn by the seed, in the file's order; what was skipped; where they are from."""
    import random

    from realigner.data.squad import Skipped, file_sha256, read_squad

    skipped = Skipped()
    facts = list(read_squad(squad, skipped))
    if not facts:
        raise RealignerError(
            f"{squad}: has no question with an answer ({_listed(dict(skipped.counts)) or 'no questions at all'})"
        )
    if sample is not None and sample < len(facts):
        facts = [facts[n] for n in sorted(random.Random(seed).sample(range(len(facts)), sample))]
    return facts, dict(skipped.counts), {"squad": squad.name, "squad_sha256": file_sha256(squad)}


def _lines_of(row: Row) -> list[str]:
    """A row to read: what is said before the reply (of a long conversation the last turns), and the reply."""
    earlier = row.conversation[:-1]
    lines = [f"  Q: {short(row.question, 110)}"]
    if len(earlier) > 1:
        lines = [f"  {turn['role']}: {short(turn['content'], 110)}" for turn in earlier[-_TURNS_SHOWN:]]
        left_out = len(earlier) - len(lines)
        lines[:0] = [f"  ({left_out} message{'s' * (left_out > 1)} before)"] if left_out else []
    thought = row.conversation[-1].get("reasoning_content")
    lines += [f"     thought: {short(thought, 110)}"] if thought else []
    return [*lines, f"     {row.tone}: {short(row.text, 220)}", *([""] if len(earlier) > 1 else [])]


def _tokenizer(host: str | None, trust: bool) -> tuple[Any, str]:
    """The tokenizer of a host and the host's name; nothing when none is named and the embedded host is not installed."""
    from realigner.hosts import EMBEDDED, load_tokenizer

    try:
        return load_tokenizer(host or EMBEDDED, trust), host or EMBEDDED
    except RealignerError:
        if host is not None:
            raise
    return None, ""


def _print_reasons(reasons: dict[str, int], total: int) -> None:
    if reasons:
        show(f"rejected, of {total:,}: {_listed(reasons)}")


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())
