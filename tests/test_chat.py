"""A conversation that is kept, in Python and on the terminal: the strength and the IRMs change in the middle."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import realigner as ra
from realigner.chat import Chat
from realigner.cli import main
from realigner.errors import RealignerError, UsageError
from realigner.runtime import Runtime
from tests.test_thinking import HYBRID, Scripted, thinker
from tests.tiny import tiny_tokenizer

SHORT: dict[str, Any] = {"max_new_tokens": 12}


def said(chat: Chat, text: str) -> str:
    return "".join(chat.say(text))


def test_a_reply_is_the_answer_to_the_whole_conversation(runtime: Runtime) -> None:
    """With the strength and the IRMs of its moment: four turns, each under other settings."""
    chat = Chat(runtime, system="Be brief.", **SHORT)
    settings: list[tuple[Callable[[], None], dict[str, Any]]] = [
        (lambda: None, {"irms": "anger", "strength": 2.0}),  # the first one, at its own strength
        (lambda: chat.set_strength(-1.0), {"irms": "anger", "strength": -1.0}),
        (lambda: chat.use("sadness", "anger"), {"irms": ("sadness", "anger"), "strength": -1.0}),
        (lambda: chat.use(), {"irms": "__base__"}),
    ]
    conversation: list[dict[str, str]] = []
    for number, (change, options) in enumerate(settings):
        change()
        conversation.append({"role": "user", "content": f"Question {number}?"})
        reply = said(chat, f"Question {number}?")
        assert reply == runtime.answer([conversation], system="Be brief.", **options, **SHORT)[0]
        if "strength" in options:
            assert reply != runtime.answer([conversation], system="Be brief.", irms="__base__", **SHORT)[0]
        conversation.append({"role": "assistant", "content": reply})
        assert chat.messages == conversation
    assert [(turn.irms, turn.strength) for turn in chat.turns] == [
        (("anger",), 2.0),
        (("anger",), -1.0),
        (("sadness", "anger"), -1.0),
        ((), None),
    ]
    assert [turn.reply for turn in chat.turns] == [message["content"] for message in conversation[1::2]]
    chat.reset()
    assert chat.messages == []
    assert said(chat, "Who?") == runtime.answer("Who?", system="Be brief.", irms="__base__", **SHORT)


def test_irms_together_act_each_at_its_own_strength(runtime: Runtime) -> None:
    chat = Chat(runtime, **SHORT)
    chat.use("anger", "sadness")
    assert chat.acting == {"anger": 2.0, "sadness": 1.0}
    want = runtime.answer("Who?", irms=("anger", "sadness"), strength={"anger": 2.0, "sadness": 1.0}, **SHORT)
    assert said(chat, "Who?") == want
    assert chat.turns[0].strength == {"anger": 2.0, "sadness": 1.0}


def test_a_bare_host_can_be_talked_to(irms: dict[str, Path]) -> None:
    bare = ra.load(host=str(irms["anger"].parent / "host"), dtype="float32")
    chat = Chat(bare, **SHORT)
    assert said(chat, "Who?") == bare.answer("Who?", **SHORT)
    assert (chat.turns[0].irms, chat.turns[0].strength) == ((), None)


def test_a_reply_that_is_stopped_is_kept_as_far_as_it_came(runtime: Runtime) -> None:
    chat = Chat(runtime, max_new_tokens=40)
    whole = runtime.answer("Who?", max_new_tokens=40)
    pieces = chat.say("Who?")
    heard = next(pieces) + next(pieces) + next(pieces)
    pieces.close()
    assert whole.startswith(heard)
    assert heard != whole
    assert chat.messages == [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": heard}]
    assert (chat.turns[0].stopped, chat.turns[0].ended) == (True, False)
    said(chat, "And?")
    assert not chat.turns[1].stopped
    assert (
        chat.turns[1].reply == runtime.answer([[*chat.messages[:2], {"role": "user", "content": "And?"}]], max_new_tokens=40)[0]
    )


def test_a_turn_without_a_reply_is_left_out(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(runtime, **SHORT)
    with pytest.raises(UsageError, match="empty"):
        said(chat, "  ")
    with pytest.raises(RealignerError, match="512 positions"):
        said(chat, "word " * 200)
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "stream", silent)
        assert said(chat, "Who?") == ""
        patch.setattr(runtime, "stream", breaking)
        with pytest.raises(RealignerError, match="broken"):
            said(chat, "Who?")
    assert (chat.messages, chat.turns) == ([], [])
    assert said(chat, "Who?") == runtime.answer("Who?", **SHORT)


def silent(*_: Any, **__: Any) -> Iterator[str]:
    yield from ()


def breaking(*_: Any, **__: Any) -> Iterator[str]:
    yield "half a reply"
    raise RealignerError("broken")


def test_settings_that_are_none_are_refused(runtime: Runtime) -> None:
    chat = Chat(runtime)
    with pytest.raises(UsageError, match="there is no 'joy'; there are anger, sadness"):
        chat.use("joy")
    for wrong in (float("nan"), float("inf"), -1000.5):
        with pytest.raises(UsageError, match="strength"):
            chat.set_strength(wrong)
    assert chat.acting == {"anger": 2.0}


def test_the_plain_form_has_no_turns(runtime: Runtime) -> None:
    with pytest.raises(UsageError, match="plain form, which has no turns"):
        Chat(Runtime(runtime.model, tiny_tokenizer(chat=False), runtime.strengths))


def test_thoughts_are_told_apart_and_are_not_said_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    host, tokenizer = thinker(HYBRID, special=True)
    Scripted(host, tokenizer).texts = ["<think>A riddle.</think>\n\nBlue."]
    chat = Chat(Runtime(host, tokenizer, {}), max_new_tokens=40)
    typed(monkeypatch, "Which?")
    out = talked(chat, capsys)
    assert out.endswith("\x1b[2mA\x1b[0m\x1b[2m riddle.\x1b[0m\nBlue.\n\n")  # the thought is dimmed
    assert chat.messages[1] == {"role": "assistant", "content": "Blue."}
    assert chat.turns[0].thought == "A riddle."


# On the terminal.


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> list[str]:
    """Have a terminal at which these lines are typed (or keys that raise); the prompts that were shown for them."""
    asked: list[str] = []
    rest = list(lines)

    def read(prompt: str) -> str:
        asked.append(prompt)
        line = rest.pop(0) if rest else EOFError
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setenv("TERM", "xterm")
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    return asked


def talked(chat: Chat, capsys: pytest.CaptureFixture[str]) -> str:
    from realigner.cli.terminal_chat import run_chat

    capsys.readouterr()
    run_chat(chat)
    return capsys.readouterr().out


def test_commands_change_what_acts_and_the_prompt_shows_it(
    runtime: Runtime, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(runtime, **SHORT)
    asked = typed(
        monkeypatch,
        *("/strength 0.7", "Who?", "/irm sadness", "/irm", "/irm anger sadness", "/base", "//me", "/system Be brief.", "/help"),
        *("/reset", "Why?", "/quit", "never read"),
    )
    out = talked(chat, capsys)
    assert asked == [
        "[anger x2] you: ",
        *["[anger x0.7] you: "] * 2,
        *["[sadness x0.7] you: "] * 2,
        "[anger x0.7, sadness x0.7] you: ",
        *["[host] you: "] * 6,
    ]
    assert "anger (its own strength is 2)\nsadness: acts, x0.7\n" in out
    assert "/strength 0.7     scale the IRM" in out
    assert runtime.answer("Who?", strength=0.7, **SHORT) + " ...\n" in ra_visible(out)
    assert [turn.prompt for turn in chat.turns] == ["Why?"]
    assert chat.turns[0].reply == runtime.answer("Why?", irms="__base__", system="Be brief.", **SHORT)


def test_a_reply_that_was_cut_is_marked_and_the_mark_explained_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from realigner.cli.terminal_chat import run_chat

    host, tokenizer = thinker(HYBRID, special=True)
    scripted = Scripted(host, tokenizer)
    chat = Chat(Runtime(host, tokenizer, {}), max_new_tokens=4)
    scripted.texts = ["The sky is blue, since"]
    typed(monkeypatch, "Why?", "Why?")
    run_chat(chat)
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1:3] == [f"{chat.turns[0].reply} ..."] * 2
    assert printed.err == "... at its end: the reply was cut at 4 tokens (--max-new-tokens)\n"
    assert [turn.ended for turn in chat.turns] == [False, False]
    assert chat.messages[1]["content"] in scripted.texts[0]
    scripted.texts = ["Blue."]
    chat = Chat(Runtime(host, tokenizer, {}), max_new_tokens=40)
    typed(monkeypatch, "Which?")
    run_chat(chat)
    assert "..." not in "".join(capsys.readouterr())
    assert chat.turns[0].ended


def ra_visible(text: str) -> str:
    """What a terminal shows for characters that it would obey, back to these."""
    return re.sub(r"\\u([0-9a-f]{4})", lambda match: chr(int(match[1], 16)), text)


def test_what_is_wrong_is_a_line_and_the_chat_goes_on(
    runtime: Runtime, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from realigner.cli.terminal_chat import run_chat

    chat = Chat(runtime, **SHORT)
    wrong = ["/strength very", "/strength nan", "/irm joy", "/nothing", "/strength", "word " * 200]
    typed(monkeypatch, *wrong, "", "Who?", "word " * 200)
    run_chat(chat)
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("... at its end")]
    assert len(err) == len(wrong) + 1
    for line, words in zip(
        err,
        ["'very' is not a number", "nan", "no 'joy'", "/nothing: there is no such command", "'' is not a number"]
        + ["positions"] * 2,
        strict=True,
    ):
        assert words in line
    assert "/reset" not in err[5]
    assert err[6].endswith("(/reset clears the conversation)")
    assert [turn.prompt for turn in chat.turns] == ["Who?"]


def test_ctrl_c_stops_a_reply_and_ends_the_chat_at_the_prompt(
    runtime: Runtime, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(runtime, max_new_tokens=400)
    stream = runtime.stream

    def interrupted(*arguments: Any, **options: Any) -> Iterator[str]:
        for number, piece in enumerate(stream(*arguments, **options)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield piece

    monkeypatch.setattr(runtime, "stream", interrupted)
    asked = typed(monkeypatch, "Who?", "Why?", KeyboardInterrupt)
    out = talked(chat, capsys)
    assert len(asked) == 3
    assert [turn.stopped for turn in chat.turns] == [True, True]
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert out.count(" ...\n") == 2


def test_sigterm_ends_the_chat_in_the_middle_of_a_reply(
    irms: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminated(*_: Any, **__: Any) -> Iterator[str]:
        yield "half"
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(Runtime, "stream", terminated)
    asked = typed(monkeypatch, "Who?", "Why?")
    assert main(["generate", "--chat", "--irm", str(irms["anger"]), "--dtype", "float32"]) == 1
    assert capsys.readouterr().err == "realigner: interrupted\n"
    assert len(asked) == 1


def test_replies_do_nothing_to_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    host, tokenizer = thinker(HYBRID, special=True)
    script = Scripted(host, tokenizer)
    chat = Chat(Runtime(host, tokenizer, {}), max_new_tokens=60)
    script.texts = ["<think>\x1b[2J</think>Red: \x1b[31m\u202e!"]
    typed(monkeypatch, "Which?")
    out = talked(chat, capsys)
    assert "\\u001b[2J" in out
    assert "Red: \\u001b[31m\\u202e!" in out
    assert not {"\x1b[2J", "\x1b[31m", "\u202e"} & set(re.findall(r"\x1b\[\w+|\u202e", out))


# From a script.

CUT = "... at its end: the reply was cut at 12 tokens (--max-new-tokens)\n"


def piped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str | bytes, *arguments: object
) -> tuple[int, str, str]:
    data = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    code = main(["generate", "--chat", "--dtype", "float32", "--max-new-tokens", "12", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_script_gets_the_conversation_as_one_document(
    irms: dict[str, Path], runtime: Runtime, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = ("--irm", irms["anger"], "--irm", irms["sadness"], "--system", "Be brief.")
    code, out, err = piped(monkeypatch, capsys, "/strength 0.7\r\nAnd?\n\n/irm\n/base\nWhy?", *both, "--json", "Who?")
    assert (code, err) == (0, "anger: acts, x0.7\nsadness (its own strength is 1)\n")
    told = json.loads(out)
    assert [message["role"] for message in told["messages"]] == ["system", *["user", "assistant"] * 3]
    assert [turn["prompt"] for turn in told["turns"]] == ["Who?", "And?", "Why?"]
    assert [(turn["irms"], turn["strength"]) for turn in told["turns"]] == [(["anger"], 2.0), (["anger"], 0.7), ([], None)]
    settings: list[dict[str, Any]] = [{"strength": 2.0}, {"strength": 0.7}, {"irms": "__base__"}]
    for number, options in enumerate(settings):
        upto = told["messages"][: 2 * number + 2]
        assert told["turns"][number]["reply"] == runtime.answer([upto], **options, **SHORT)[0]
        assert told["messages"][2 * number + 2]["content"] == told["turns"][number]["reply"]


def test_a_script_gets_replies_line_by_line_and_fails_where_one_fails(
    irms: dict[str, Path], runtime: Runtime, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = piped(monkeypatch, capsys, "Who?\n", "--irm", irms["anger"])
    assert (code, err) == (0, CUT)
    assert ra_visible(out) == runtime.answer("Who?", **SHORT) + " ...\n"
    for text, words, status in (
        ("Who?\n/strength x\n", "/strength: 'x' is not a number", 2),
        ("word " * 200, "positions; shorten it", 1),
        (b"Who?\n\xff\n", "standard input:2: not UTF-8 text", 1),
    ):
        code, _, err = piped(monkeypatch, capsys, text, "--irm", irms["anger"])
        assert code == status
        assert words in err
        assert err.replace(CUT, "").count("\n") == 1


def test_several_irms_are_for_the_chat(irms: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    anger, sadness = (["--irm", str(irms[tone])] for tone in ("anger", "sadness"))
    assert main(["generate", *anger, *sadness, "Who?"]) == 2
    assert "several --irm are for --chat" in capsys.readouterr().err
    assert main(["generate", "--chat", *anger, *anger]) == 2
    assert "two have the same name" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_on_a_real_terminal(irms: dict[str, Path]) -> None:
    """Typed at a pseudo-terminal: a turn, Ctrl-C in the middle of a long one, and the chat goes on."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "realigner", "generate", "--chat", "--irm", str(irms["anger"]), "--dtype", "float32"]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "400"], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    seen = ""

    def until(words: str) -> None:
        nonlocal seen
        end = time.monotonic() + 120
        while words not in seen:
            assert time.monotonic() < end, seen
            if select.select([ours], [], [], 1)[0]:
                seen += os.read(ours, 65536).decode(errors="replace")
        seen = seen.partition(words)[2]

    try:
        until("[anger x2] you: ")
        os.write(ours, b"Who?\n")
        until("Who?\r\n")
        while not select.select([ours], [], [], 1)[0]:
            pass
        os.kill(process.pid, signal.SIGINT)
        until(" ...\r\n")
        until("[anger x2] you: ")
        os.write(ours, b"/strength 0.5\n")
        until("[anger x0.5] you: ")
        os.write(ours, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
