"""What commands share: their options, and how results are printed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Optional, TypeVar

import typer

from realigner.console import say, show
from realigner.dialogues import Asked, Dialogue, read_prompts
from realigner.errors import RealignerError, UsageError
from realigner.prompts import PAPER_PROMPTS, Answer

_T = TypeVar("_T")

HostOfIrm = Annotated[Optional[str], typer.Option("--host", help="The host; by default the one the IRM was made for.")]
Irms = Annotated[
    list[Path],
    typer.Option("--irm", help="A run's folder, a sweep's (all its runs), or a ready-made IRM's name (anger); repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on standard output.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=2**32 - 1)]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ..., or auto.")]
Where = Annotated[str, typer.Option(help="The tokens the IRM acts on: all, prompt, reply, or N for the reply's first N.")]
Strength = Annotated[
    float,
    typer.Option(
        help="Scale of every IRM: 0 is the bare host, 1 the IRM as trained, whatever it recommends.", min=-1000, max=1000
    ),
]
Penalty = Annotated[
    Optional[float],
    typer.Option(
        help="Above 1, tokens already in the text are made less likely; 1 is off.", show_default="1.1; an endpoint's own"
    ),
]
Prompts = Annotated[
    Optional[str],
    typer.Option(help="'paper' for the paper's seven, a text file with a prompt a line, or a .jsonl file with conversations."),
]
Questions = Annotated[Optional[list[str]], typer.Argument(help="Prompts.", show_default=False)]
MaxNewTokens = Annotated[int, typer.Option(help="Maximum new tokens per reply.", min=1)]
System = Annotated[Optional[str], typer.Option(help="System prompt.", show_default=False)]
TemplateKwargs = Annotated[
    Optional[str],
    typer.Option(
        "--chat-template-kwargs",
        metavar="JSON",
        help="""Variables of the host's chat template, e.g. '{"enable_thinking": false}'.""",
        show_default=False,
    ),
]
ThinkingBudget = Annotated[int, typer.Option(help="Maximum reasoning tokens, on hosts that think (reasoning models).", min=0)]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let code from the host's repository run.")]


def one_of(flag: str, value: str, choices: Sequence[str]) -> None:
    """Raise unless a flag's value is one of those it takes."""
    if value not in choices:
        raise UsageError(f"{flag}: {value!r} is not one of {', '.join(choices)}")


def prompts_from(questions: Sequence[str] | None, source: str | None) -> list[Asked]:
    """The prompts of the command line and those of ``--prompts``."""
    asked: list[Asked] = [*(questions or [])]
    if any(isinstance(question, str) and not question.strip() for question in asked):
        raise UsageError("a prompt is empty")
    if source is not None:
        asked += PAPER_PROMPTS if source == "paper" else read_prompts(source)
    if not asked:
        raise UsageError("no prompt given; write one, or use --prompts paper")
    return asked


def template_kwargs(text: str | None) -> dict[str, Any] | None:
    """The value of ``--chat-template-kwargs``."""
    if text is None:
        return None
    from realigner.chat_format import check_template_kwargs

    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--chat-template-kwargs: {short(text, 40)!r} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UsageError(f"--chat-template-kwargs: {short(text, 40)!r} is not a JSON object")
    check_template_kwargs(value)
    return value


def claim(context: typer.Context, place: AbstractContextManager[_T]) -> _T:
    """Hold a place until the command is over, so that a second command is refused before its long work (`files.claimed`)."""
    from realigner.files import claimed

    return context.with_resource(claimed(place))


def refuse_missing(paths: Sequence[Path]) -> None:
    """Raise for the first path that does not exist."""
    for path in paths:
        if not path.exists():
            from realigner.irm_sources import ready_made

            hint = (
                "; a ready-made IRM has no run's record: generate, app, serve and trace take it"
                if str(path) in ready_made()
                else ""
            )
            raise RealignerError(f"{path}: there is no such run or trace{hint}")


def short(text: str, most: int = 200) -> str:
    """One line, cut where it gets too long."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."


def of_prompt(prompt: Asked, replies: Mapping[str, list[Any]]) -> dict[str, Any]:
    """What there is of each reply, as a result has it: of a dialogue a list of all its questions', else the only one's."""
    return {key: list(given) if isinstance(prompt, Dialogue) else given[0] for key, given in replies.items()}


def shown(reply: Answer) -> str:
    """A reply as it is printed: one that was cut at the limit of tokens ends in `` ...``."""
    return reply if reply.ended else f"{reply} ..."


def say_cut(ended: Iterable[bool], max_new_tokens: int) -> None:
    """Say what `` ...`` means, if a reply did not come to its end."""
    if not all(ended):
        say(f"... at its end: the reply was cut at {max_new_tokens} token{'s' * (max_new_tokens > 1)} (--max-new-tokens)")


def print_json(value: Any) -> None:
    """The one document of ``--json``."""
    show(json.dumps(value, ensure_ascii=False, indent=2))  # what a terminal would obey becomes JSON's own escape of it
