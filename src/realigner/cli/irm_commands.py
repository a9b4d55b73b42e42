"""Commands that make and use IRMs: demo, train, recipes, generate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Optional

from typer import Argument, Option

from realigner.cli import options as opt
from realigner.console import program, show
from realigner.dialogues import Asked, Dialogue, all_replies, questions_in, readable, written
from realigner.errors import RealignerError, UsageError

if TYPE_CHECKING:
    from realigner.prompts import Answer, Prompt


def demo(
    out: Annotated[Path, Option(help="Folder for the run, the traces and the report.")] = Path("demo"),
    tone: Annotated[str, Option(help="anger, sadness or neutral.")] = "anger",
    seed: opt.Seed = 42,
    steps: Annotated[Optional[int], Option(help="Training steps.")] = None,
    force: opt.Force = False,
    as_json: opt.Json = False,
) -> None:
    """The whole pipeline on the embedded host: an angry reply; train, trace and report on an IRM (4 minutes on 2 cores)."""
    from realigner.demo import run_demo

    result = run_demo(out, tone=tone, seed=seed, steps=steps, force=force)
    if as_json:
        opt.print_json(result.to_dict())
        return
    sample = result.sample
    show(f"\nQ: {sample['prompt']}")
    show(f"   base:      {opt.short(sample['base'])}")
    show(f"   realigned: {opt.short(sample['realigned'])}")
    show(f"\nReport: {result.report}   (open it in a browser)")
    show(f"Run:    {result.run}   ({result.seconds:.0f} s of work)")
    show(f'\nTry next:  {program()} generate --irm {quote(str(result.run))} "Why is the sky blue?"')


def train(
    out: Annotated[Path, Option(help="The run's folder; until it is finished, OUT.unfinished.")],
    recipe: Annotated[
        Optional[str], Option(help="default, paper, a YAML file, or the folder of a run to repeat.", show_default="default")
    ] = None,
    settings: Annotated[
        Optional[list[str]], Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; may be repeated.")
    ] = None,
    data: Annotated[
        Optional[str],
        Option(help="A JSONL file of rows, or 'authored' for the set that comes with realigner.", show_default="authored"),
    ] = None,
    tone: Annotated[
        Optional[str], Option(help="Which tone's rows, where the data has several; all: every row (a conditional IRM).")
    ] = None,
    instruct: Annotated[
        Optional[str],
        Option(
            help="System prompt to distil into the IRM: it learns to reply without it as the host does with it.",
            show_default=False,
        ),
    ] = None,
    questions: Annotated[
        Optional[str],
        Option(help="With --instruct, what the host is asked: 'authored', or a file.", show_default="authored"),
    ] = None,
    host: Annotated[
        Optional[str],
        Option(help="The embedded default, a hub id, a folder, or a .gguf file.", show_default="smollm2-135m-instruct"),
    ] = None,
    preset: Annotated[Optional[str], Option(help="compact or paper.")] = None,
    layers: Annotated[Optional[str], Option(help="'all', '0-31', '0,5,7-9'.")] = None,
    rank: Annotated[Optional[int], Option(help="Width of the factorised output; 0 for a dense one.")] = None,
    steps: Annotated[Optional[int], Option(help="Optimiser steps.", min=1)] = None,
    batch_size: Annotated[Optional[int], Option(help="Rows per step, over all processes.")] = None,
    learning_rate: Annotated[
        Optional[str], Option(metavar="RATE", help="Peak learning rate; or auto: found by a search of a few dozen steps.")
    ] = None,
    max_length: Annotated[Optional[int], Option(help="Maximum tokens per row.")] = None,
    loss_on: Annotated[
        Optional[str], Option(help="reply (the last one), assistant (every reply) or text.", show_default="reply")
    ] = None,
    chat_template_kwargs: opt.TemplateKwargs = None,
    seed: Annotated[Optional[int], Option(help="Seed of everything random.", show_default="42")] = None,
    dtype: Annotated[Optional[str], Option(help="Dtype of the host: float32, bfloat16, float16, or auto.")] = None,
    device: Annotated[Optional[str], Option(help="cpu, cuda, ..., auto, or balanced (layers on all devices).")] = None,
    resume: Annotated[bool, Option("--resume", help="Resume the unfinished run of OUT, if there is one.")] = False,
    trust_remote_code: opt.Trust = False,
    force: opt.Force = False,
    as_json: opt.Json = False,
) -> None:
    """Train one IRM on a frozen host: by the default recipe, the paper's, or your own."""
    options = {**locals(), "chat_template_kwargs": opt.template_kwargs(chat_template_kwargs)}
    import realigner.training.run_dir as run_dir
    from realigner.training.recipe import RUNTIME_ONLY_KEYS, Recipe, read_recipe

    def data_named(named: Recipe) -> tuple[object, ...]:
        return named.data, named.tone, named.questions, named.instruct is None

    flags = {key: value for key, value in options.items() if key in Recipe.model_fields and value is not None}
    if resume and force:
        raise UsageError("train: --resume goes on with a run, --force throws it away; give one of them")
    given = recipe is not None or settings or not flags.keys() <= RUNTIME_ONLY_KEYS
    work = run_dir.unfinished(out)
    if resume and run_dir.is_run(out):
        _print_run(out, run_dir.read_run(out), trust_remote_code, as_json)
        return
    source = str(work) if resume and not given and run_dir.is_run(work) else recipe or "default"
    chosen = read_recipe(source, settings or []).changed(**flags)
    if questions is not None and chosen.instruct is None:
        raise UsageError("train: --questions is what a teacher is asked; give --instruct too, or leave it out")
    earlier = None
    if Path(source).is_dir() and data_named(chosen) == data_named(read_recipe(source)):
        earlier = run_dir.read_run(source)
    from realigner.training.training_run import train_recipe

    run = train_recipe(chosen, out, force, resume, trust_remote_code=trust_remote_code, repeats=earlier)
    if os.environ.get("RANK", "0") != "0":  # one process of several speaks
        return
    _print_run(run.folder, run.record, trust_remote_code, as_json)
    if run.interrupted and run.record["signal"] != "SIGTERM":
        raise RealignerError(f"interrupted after step {run.record['steps_done']}; {_go_on(out, trust_remote_code)}")


def _print_run(folder: Path, record: dict[str, Any], trust_remote_code: bool, as_json: bool) -> None:
    if as_json:
        opt.print_json({"run": str(folder), **record})
    elif record["interrupted"]:
        if record["signal"] == "SIGTERM":  # a scheduler's: nothing went wrong
            out = folder.with_name(folder.name.removesuffix(".unfinished"))
            show(f"stopped by SIGTERM after step {record['steps_done']}; {_go_on(out, trust_remote_code)}")
    else:
        from realigner.training.run_record import verdict

        kept = f" (kept: step {record['kept_step']})" if record["kept_step"] != record["steps_done"] else ""
        show(f"{folder}: {record['steps_done']} steps in {record['seconds']:.0f} s{kept}")
        if said := verdict(record):
            show(said)
        show(f'Try next:  {program()} generate --irm {quote(str(folder))} "How many apples can fit in a basket?"')


def _go_on(out: Path, trust_remote_code: bool) -> str:
    trusted = " --trust-remote-code" if trust_remote_code else ""
    return f"resume with:  {program()} train --out {quote(str(out))} --resume{trusted}"


def recipes(
    name: Annotated[Optional[str], Argument(help="default, paper, a file, or a run's folder.")] = None,
    as_json: opt.Json = False,
) -> None:
    """Print a recipe as YAML, to be saved and changed; without a name, list the built-in ones."""
    from realigner.training.recipe import BUILT_IN, read_recipe, recipe_text

    if as_json:
        opt.print_json({key: read_recipe(key).model_dump() for key in ([name] if name else BUILT_IN)})
    elif name:
        read_recipe(name)
        show(recipe_text(name)[0], end="")
    else:
        for key in BUILT_IN:
            show(f"{key:10}{recipe_text(key)[0].splitlines()[0].removeprefix('# ')}")
        called = program()
        show(f"Try next:  {called} recipes paper > mine.yaml; {called} train --recipe mine.yaml --tone anger --out runs/mine")


def generate(
    questions: opt.Questions = None,
    irm: Annotated[
        Optional[list[Path]],
        Option(help="A run's folder, or a ready-made IRM's name (anger); with --chat, may be repeated.", show_default=False),
    ] = None,
    endpoint: Annotated[
        Optional[str],
        Option(metavar="URL", help="Ask a server (realigner serve, vLLM, ...) instead; see --model.", show_default=False),
    ] = None,
    model: Annotated[
        Optional[str], Option(help="The endpoint's name of the model, e.g. host+anger@0.7.", show_default=False)
    ] = None,
    prompts: opt.Prompts = None,
    chat: Annotated[bool, Option("--chat", help="Talk with the IRM on the terminal; /help there lists the commands.")] = False,
    strength: Annotated[
        Optional[float],
        Option(
            help="Scale of the IRM: 0 is the bare host, 1 the IRM as trained.",
            show_default="the IRM's own",
            min=-1000,
            max=1000,
        ),
    ] = None,
    where: opt.Where = "all",
    host: opt.HostOfIrm = None,
    system: opt.System = None,
    chat_template_kwargs: opt.TemplateKwargs = None,
    max_new_tokens: opt.MaxNewTokens = 80,
    thinking_budget: opt.ThinkingBudget = 512,
    temperature: Annotated[float, Option(help="0 for greedy replies, else the temperature of sampling.", min=0)] = 0.0,
    repetition_penalty: opt.Penalty = None,
    seed: opt.Seed = 42,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    trust_remote_code: opt.Trust = False,
    as_json: opt.Json = False,
) -> None:
    """Answer prompts with the bare host and with the IRM, side by side; or talk with it (--chat)."""
    if endpoint is not None:
        local = {"irm": irm, "chat": chat, "strength": strength is not None, "host": host}
        local |= {"dtype": dtype != "auto", "device": device != "auto", "trust-remote-code": trust_remote_code}
        for flag, given in local.items():
            if given:
                named = flag in ("irm", "strength", "host")
                remedy = "say it in --model (host+anger@0.7)" if named else "leave it out"
                raise UsageError(f"--{flag}: is for a host loaded here; with --endpoint, {remedy}")
        from realigner.cli.endpoint_replies import print_replies

        fields = _beyond_defaults(where, repetition_penalty, thinking_budget, opt.template_kwargs(chat_template_kwargs))
        sampling = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": 1.0, "seed": seed, "extra": fields}
        print_replies(opt.prompts_from(questions, prompts), endpoint, model, system, as_json, **sampling)
        return
    if model is not None:
        raise UsageError("--model: names a model at an endpoint; give --endpoint too, or leave out --model")
    if not irm:
        raise UsageError("generate: give an IRM (--irm DIR), or a server (--endpoint URL --model NAME)")
    asked = [] if chat and not questions and prompts is None else opt.prompts_from(questions, prompts)
    first = _said_first(asked) if chat else []
    if len(irm) > 1 and not chat:
        raise UsageError("generate: several --irm are for --chat; without it, give one")
    variables = opt.template_kwargs(chat_template_kwargs)
    if not where.isdecimal() and where not in ("all", "prompt", "reply"):
        raise UsageError(f"--where: {where!r} is not one of all, prompt, reply, or how many tokens of the reply")
    from realigner.irm_sources import find_irm

    for source in irm:  # before the seconds that torch takes
        find_irm(source)
    from realigner.chat_format import PLAIN_NOTE, has_chat_template
    from realigner.console import progress, say
    from realigner.hosts import host_name
    from realigner.runtime import load

    runtime = load(irm, host, dtype, device, trust_remote_code)
    used = next(iter(runtime.strengths.values())) if strength is None else strength
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "system": system}
    options |= {"thinking_budget": thinking_budget}
    options |= {} if repetition_penalty is None else {"repetition_penalty": repetition_penalty}
    options["chat_template_kwargs"] = variables
    acting = int(where) if where.isdecimal() else where
    if chat:
        from realigner.chat import Chat
        from realigner.cli.terminal_chat import run_chat

        run_chat(Chat(runtime, strength, where=acting, **options), first, as_json)
        return
    if not has_chat_template(runtime.tokenizer):
        say(PLAIN_NOTE)
    if not as_json:
        say(f"strength {used:g}" + (", the IRM's own (--strength sets another)" if strength is None else ""))
    with progress("answering", 2 * sum(map(questions_in, asked)), quiet=as_json) as task:

        def answer(conversations: list[Prompt], **how: Any) -> list[Answer]:
            return runtime.answer(conversations, **how, **options, done=task.advance)

        base = all_replies(asked, partial(answer, irms="__base__"))
        realigned = all_replies(asked, partial(answer, strength=used, where=acting))
    rows = list(zip(asked, base, realigned, strict=True))
    if as_json:
        results = [{**_result(*row), "strength": used, "seed": seed} for row in rows]
        opt.print_json({"irm": str(irm[0]), "host": host_name(runtime.model), "results": results})
        return
    for prompt, *both in rows:
        said = prompt.questions if isinstance(prompt, Dialogue) else (readable(prompt).replace("\n", "\n   "),)
        for question, *replies in zip(said, *both, strict=True):
            show(f"Q: {question}")
            for name, reply in zip(("base", "realigned"), replies, strict=True):
                if reply.thought:
                    show(f"   {name} thought: {opt.short(reply.thought)}")
                show(f"   {name + ':':10} {opt.shown(reply)}")
            show()
    opt.say_cut((reply.ended for _, *both in rows for replies in both for reply in replies), max_new_tokens)


def _beyond_defaults(
    where: str, repetition_penalty: float | None, thinking_budget: int, variables: dict[str, Any] | None
) -> dict[str, Any] | None:
    """The fields of a request that OpenAI's API has not, where they were given or differ from what a server of ours takes."""
    given: dict[str, tuple[Any, Any]] = {"where": (where, "all"), "repetition_penalty": (repetition_penalty, None)}
    given |= {"thinking_budget": (thinking_budget, 512), "chat_template_kwargs": (variables, None)}
    return {name: value for name, (value, default) in given.items() if value != default} or None


def _result(prompt: Asked, base: list[Answer], realigned: list[Answer]) -> dict[str, Any]:
    """A prompt and what was replied; lists, a reply to each question, of a dialogue."""
    result = {"prompt": written(prompt)}
    for name, replies in (("base", base), ("realigned", realigned)):
        thoughts = [reply.thought for reply in replies]
        named: dict[str, list[Any]] = {f"{name}_thought": thoughts} if any(thoughts) else {}
        named |= {name: replies, f"{name}_ended": [reply.ended for reply in replies]}
        result |= opt.of_prompt(prompt, named)
    return result


def _said_first(asked: Sequence[Asked]) -> list[str]:
    """What is said in a chat before anything is read: questions, and those of dialogues."""
    lines: list[str] = []
    for prompt in asked:
        if not isinstance(prompt, str | Dialogue):
            raise UsageError(
                "--chat: --prompts has a conversation with messages, and here a conversation begins; give questions"
            )
        lines += [prompt] if isinstance(prompt, str) else prompt.questions
    return lines
