"""The terminal chat of ``realigner generate --chat``: lines in, replies out as they come; the conversation is `chat.Chat`'s."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict
from typing import Any

from realigner.chat import Chat
from realigner.cli import options as opt
from realigner.console import say, show, show_aside, signals_to
from realigner.errors import RealignerError, UsageError, visible
from realigner.files import decoded
from realigner.generation import Thought

HELP = """\
/strength 0.7     scale the IRM: 0 is the bare host, 1 the IRM as trained
/irm              list the IRMs, and which are active
/irm NAME         activate this IRM alone; several names: their sum
/base             deactivate all IRMs: the bare host
/system TEXT      set the system prompt; without a text, none
/reset            clear the conversation; the settings stay
/help, /quit      this list; the end (as Ctrl-D)
Ctrl-C stops a reply. To say something that begins with a slash, write two: //like this."""


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends the chat, where Ctrl-C ends a reply."""


def run_chat(chat: Chat, first: Sequence[str] = (), as_json: bool = False) -> None:
    """Chat until the input ends: on a terminal with a prompt that shows what acts; else line by line, for scripts.

    Args:
        chat: the conversation.
        first: what is said before anything is read.
        as_json: print the conversation as one JSON document at its end, and nothing before it.

    Raises:
        RealignerError: when a reply fails and nobody is there to read why.
    """
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
    if at_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401 - gives input() its editing and its history
        show("Say something; /help lists the commands.")
    told = False  # what " ..." at a reply's end means
    with signals_to(_interrupt):
        for line in _lines(chat, first, at_terminal):
            try:
                if line.startswith("/") and not line.startswith("//"):
                    if _obeyed(chat, line, show if at_terminal else say):
                        break
                elif line.strip():
                    said = line.removeprefix("/") if line.startswith("//") else line
                    cut = _reply(chat, said, at_terminal, quiet=as_json)
                    if cut and not (told or as_json):
                        opt.say_cut([False], chat.options["max_new_tokens"])
                    told = told or cut
            except RealignerError as error:
                if not at_terminal:
                    raise
                say(f"{error}{' (/reset clears the conversation)' if chat.messages else ''}")
    if as_json:
        system = [] if chat.system is None else [{"role": "system", "content": chat.system}]
        opt.print_json({"messages": system + chat.messages, "turns": [asdict(turn) for turn in chat.turns]})


def _interrupt(number: int, _: Any) -> None:
    raise _Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _lines(chat: Chat, first: Sequence[str], at_terminal: bool) -> Iterator[str]:
    for line in first:
        if at_terminal:
            show(_prompt(chat) + line)
        yield line
    if not at_terminal:
        for number, data in enumerate(sys.stdin.buffer, start=1):
            yield decoded(data, "standard input", number).rstrip("\r\n")
        return
    while True:
        try:
            yield input(_prompt(chat))
        except _Terminated:
            raise
        except (KeyboardInterrupt, EOFError):
            show()
            return


def _prompt(chat: Chat) -> str:
    acting = ", ".join(f"{name} x{strength:g}" for name, strength in chat.acting.items())
    return visible(f"[{acting or 'host'}] you: ")


def _reply(chat: Chat, text: str, at_terminal: bool, quiet: bool) -> bool:
    """Print the reply as it comes; whether it was cut at the limit of tokens."""
    thinking, before = False, len(chat.turns)
    try:
        with closing(chat.say(text)) as pieces:
            for piece in pieces:
                thought = isinstance(piece, Thought)
                if quiet or (thought and not at_terminal):  # a script wants the reply
                    continue
                if thinking and not thought:
                    show()
                thinking = thought
                (show_aside if thought else show)(piece, end="")
                sys.stdout.flush()
    except _Terminated:
        raise
    except KeyboardInterrupt:
        if not at_terminal:
            raise
        show(" ...", end="")
    cut = any(not (turn.ended or turn.stopped) for turn in chat.turns[before:])
    if not quiet:
        show(" ..." if cut else "")
    return cut


def _obeyed(chat: Chat, line: str, tell: Callable[[str], None]) -> bool:
    """Do what a command says; whether it ends the chat."""
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if command == "/strength":
        try:
            chat.set_strength(float(rest))
        except ValueError:
            raise UsageError(f"/strength: {rest!r} is not a number from -1000 to 1000; write /strength 0.7") from None
    elif command == "/irm" and rest:
        chat.use(*([rest] if rest in chat.runtime.irms else rest.split()))
    elif command == "/irm":
        acting = chat.acting
        for name, own in chat.runtime.strengths.items():
            tell(f"{name}: acts, x{acting[name]:g}" if name in acting else f"{name} (its own strength is {own:g})")
    elif command == "/base":
        chat.use()
    elif command == "/system":
        chat.system = rest or None
    elif command == "/reset":
        chat.reset()
    elif command == "/help":
        tell(HELP)
    elif command != "/quit":
        raise UsageError(f"{command}: there is no such command; /help lists them")
    return command == "/quit"
