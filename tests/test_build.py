"""A build that can die: whatever happens to it, it ends in the file it would have made."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from realigner.data import Fact, Tone, load_tone, read_rows
from realigner.data.append_log import AppendLog
from realigner.data.build_dataset import build
from realigner.data.quality_filter import QualityFilter
from realigner.data.rewriters import NoAnswerError, Reply, RewriteRequest
from realigner.data.rewriters.template_rewriter import TemplateRewriter
from realigner.errors import RealignerError, UsageError

PLAIN = Tone(name="plain", language="any", instruction="Say it plainly.")
FACTS = [
    Fact(str(n), f"group {n % 5}", f"What is the number of {word} {n}?", f"{n} {word}")
    for n, word in enumerate(random.Random(3).choices(["apples", "rivers", "kings", "wheels", "stars"], k=60))
]
ENDINGS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")


def say(request: RewriteRequest) -> str:
    """A good reply to most; every seventh is bad at first, one never gets better, and every tenth is a copy at first."""
    number = int(request.fact.id)
    if number == 14 or (number % 7 == 0 and request.attempt == 0):
        return "I'm sorry, but I can't answer that."
    copied = number - 1 if number % 10 == 9 and request.attempt == 0 else number
    words = random.Random(copied * 10 + request.attempt).choices(ENDINGS, k=40)
    return f"It is {' '.join(words)}, {request.fact.answer}."


class Scripted:
    """A rewriter that says what it is told to, in any order, and may fail."""

    def __init__(
        self,
        answer: Callable[[RewriteRequest], str] = say,
        order: int | None = None,
        fail: Callable[[int, RewriteRequest], str] | None = None,
    ):
        self.answer, self.order, self.fail = answer, order, fail
        self.asked: list[tuple[str, int]] = []

    def spec(self) -> dict[str, Any]:
        return {"rewriter": "scripted"}

    def note(self) -> str:
        return ""

    def rewrite(self, requests: Sequence[RewriteRequest], verified: bool = False) -> Generator[Reply, None, None]:
        requests = list(requests)
        if self.order is not None:
            random.Random(self.order).shuffle(requests)
        for request in requests:
            self.asked.append((request.fact.id, request.attempt))
            error = self.fail(len(self.asked), request) if self.fail else ""
            yield Reply(request.fact.id, request.attempt, "" if error else self.answer(request), 10, 5, error=error)


def make(folder: Path, rewriter: Scripted | None = None, **options: Any) -> dict[str, bytes]:
    """Build into a folder; everything that is in it afterwards."""
    build(FACTS, PLAIN, rewriter or Scripted(), folder / "rows.jsonl", quiet=True, **options)
    return contents(folder)


def cleared(folder: Path) -> None:
    """Take a finished build away, with what lies beside it: without `force` nothing of it would be replaced."""
    for path in folder.glob("rows.*"):
        path.unlink()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted build makes."""
    return make(tmp_path_factory.mktemp("whole"))


def test_every_fact_is_accounted_for(tmp_path: Path) -> None:
    rewriter = Scripted()
    built = build(FACTS, PLAIN, rewriter, tmp_path / "rows.jsonl", quiet=True)
    rows = read_rows(tmp_path / "rows.jsonl")
    rejected = [json.loads(line) for line in (tmp_path / "rows.rejected.jsonl").read_text().splitlines()]
    order = [row.id.removesuffix("-plain") for row in rows]
    assert order == sorted(order, key=int)
    assert {*order, *(item["id"] for item in rejected)} == {fact.id for fact in FACTS}
    assert len(rows) + len(rejected) == len(FACTS) == built.rows + built.rejected
    assert [(item["id"], item["reason"], len(item["texts"])) for item in rejected] == [("14", "refusal", 3)]
    assert built.reasons == {
        "refusal": 11,
        "near-duplicate": 4,
    }  # 0, 7, ... 56, 14 thrice; 9, 19, 39, 59 (28 and 49 were refused)
    assert len(rewriter.asked) == len(set(rewriter.asked)) == built.replies == 60 + 9 + 4 + 1
    assert built.tokens_in == 10 * built.replies
    about = json.loads((tmp_path / "rows.build.json").read_text())
    assert about["rows"] == 59
    assert about["rewriter"] == "scripted"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.build.json", "rows.jsonl", "rows.rejected.jsonl"]


@pytest.mark.parametrize("order", range(5))
def test_the_order_of_replies_makes_no_difference(tmp_path: Path, whole: dict[str, bytes], order: int) -> None:
    assert make(tmp_path, Scripted(order=order)) == whole


def broken_off(folder: Path, after: int, error: BaseException, order: int | None = None) -> Scripted:
    """A build whose rewriter raises after so many replies."""

    def fail(count: int, request: RewriteRequest) -> str:
        if count > after:
            raise error
        return ""

    rewriter = Scripted(order=order, fail=fail)
    with pytest.raises(type(error)):
        make(folder, rewriter)
    assert not (folder / "rows.jsonl").exists()
    return rewriter


@pytest.mark.parametrize("after", [0, 1, 33, 60, 61, 70])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RealignerError("the endpoint is gone")], ids=["ctrl-c", "dead"])
def test_broken_off_and_resumed(tmp_path: Path, whole: dict[str, bytes], after: int, error: BaseException) -> None:
    """Nothing is lost, nothing asked twice."""
    first = broken_off(tmp_path, after, error, order=7)
    second = Scripted()
    assert make(tmp_path, second) == whole
    answered = first.asked[:after]
    assert not set(answered) & set(second.asked)
    assert len(answered) + len(second.asked) == 74


@pytest.mark.proof
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 1), order=st.integers(0, 3))
def test_a_journal_cut_at_any_byte(
    tmp_path_factory: pytest.TempPathFactory, whole: dict[str, bytes], cut: float, order: int
) -> None:
    """What kill -9 leaves: any number of whole lines, and perhaps a part of one."""
    folder = tmp_path_factory.mktemp("cut")
    broken_off(folder, 72, KeyboardInterrupt(), order)
    journal = folder / "rows.journal"
    content = journal.read_bytes()
    journal.write_bytes(content[: round(cut * len(content))])
    assert make(folder) == whole


def slowly(request: RewriteRequest) -> str:
    time.sleep(0.004)
    return say(request)


def test_killed_at_random_moments(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """SIGKILL, twenty times, in the middle of whatever it does; then to the end."""
    chance = random.Random(11)
    killed = 0
    for _ in range(20):
        child = os.fork()
        if child == 0:
            try:
                make(tmp_path, Scripted(slowly, order=5))
            finally:
                os._exit(0)
        time.sleep(chance.uniform(0.005, 0.06))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert killed >= 10
    if not (tmp_path / "rows.jsonl").exists():  # on a busy machine the last may have died before it wrote anything
        make(tmp_path)
    assert contents(tmp_path) == whole


def test_requests_that_fail_are_asked_again_and_then_counted(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """A failure costs a fact none of its attempts; one that lasts is kept for another day, or given up when asked."""
    once = Scripted(fail=lambda count, request: "HTTP 500" if count % 5 == 0 and count <= 60 else "")
    assert make(tmp_path, once) == whole
    cleared(tmp_path)
    never = Scripted(fail=lambda count, request: "HTTP 500 after 6 tries" if request.fact.id == "20" else "")
    for _ in range(2):
        with pytest.raises(RealignerError, match=r"1 questions got no reply \(HTTP 500 after 6 tries\).*give_up"):
            make(tmp_path, never)
    assert not (tmp_path / "rows.jsonl").exists()
    made = make(tmp_path, never, give_up=True)
    rejected = [json.loads(line) for line in made["rows.rejected.jsonl"].splitlines()]
    assert [(item["id"], item["reason"]) for item in rejected if item["id"] == "20"] == [
        ("20", "no reply: HTTP 500 after 6 tries")
    ]
    assert len(read_rows(tmp_path / "rows.jsonl")) + len(rejected) == 60


def test_giving_up_does_not_leave_out_what_was_never_asked(tmp_path: Path) -> None:
    """A service that goes away: with `give_up`, what failed is left out, and what was not asked is asked another day."""

    class Gone(Scripted):
        def rewrite(self, requests: Sequence[RewriteRequest], verified: bool = False) -> Generator[Reply, None, None]:
            for number, reply in enumerate(super().rewrite(requests, verified)):
                if number == 30:
                    raise NoAnswerError("gone")
                yield reply

    with pytest.raises(NoAnswerError, match="gone"):
        make(tmp_path, Gone(), give_up=True)
    assert (tmp_path / "rows.journal").exists()
    assert not (tmp_path / "rows.jsonl").exists()


def test_refusals(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    make(tmp_path)
    with pytest.raises(RealignerError, match="exists already"):
        make(tmp_path)
    make(tmp_path, force=True)
    out.write_text("not ours")
    with pytest.raises(RealignerError, match="not something realigner made"):
        make(tmp_path, force=True)
    cleared(tmp_path)
    broken_off(tmp_path, 5, KeyboardInterrupt())
    with pytest.raises(RealignerError, match=r"belongs to another build \(its facts is 60, asked for is 59"):
        build(FACTS[1:], PLAIN, Scripted(), out, quiet=True)
    other = PLAIN.model_copy(update={"instruction": "Say it otherwise."})
    with pytest.raises(RealignerError, match="its tone_sha256"):
        build(FACTS, other, Scripted(), out, quiet=True)
    with pytest.raises(RealignerError, match="duplicate id"):
        build([*FACTS, FACTS[0]], PLAIN, Scripted(), tmp_path / "else.jsonl", quiet=True)
    with pytest.raises(RealignerError, match="nothing to rewrite"):
        build([], PLAIN, Scripted(), tmp_path / "none.jsonl", quiet=True)
    with pytest.raises(UsageError, match="attempts"):
        build(FACTS, PLAIN, Scripted(), tmp_path / "none.jsonl", attempts=0)
    with pytest.raises(RealignerError, match=r"no reply passed the quality filter \(empty 180"):
        build(FACTS, PLAIN, Scripted(lambda ask: ""), tmp_path / "none.jsonl", quiet=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"SPEC\n\xff\xfe\n", ":2: is damaged"),
        (b"SPEC\nnull\n", ":2: is damaged"),
        (b'SPEC\n{"id": "1"}\n', "an entry that is not a reply"),
        (b'SPEC\n{"id": "1", "attempt": "x", "text": "t", "tokens": [0, 0]}\n', "an entry that is not a reply"),
        (b"SPEC\n{\n", ":2: is damaged"),
    ],
)
def test_damaged_journals(tmp_path: Path, content: bytes, message: str) -> None:
    broken_off(tmp_path, 0, KeyboardInterrupt())
    journal = tmp_path / "rows.journal"
    spec = journal.read_bytes().splitlines()[0]
    journal.write_bytes(content.replace(b"SPEC", spec))
    with pytest.raises(RealignerError, match=message) as caught:
        make(tmp_path)
    assert "\n" not in str(caught.value)
    if "damaged" in message:
        make(tmp_path, force=True)


@pytest.mark.parametrize("content", [b"my diary", b"my diary\n", b"\n", b"{}\n", b"[1]\n", b"\xff\xfe\n", b'{"journal'])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path, content: bytes) -> None:
    """But for the first bytes of one of ours, which a kill may leave."""
    journal = tmp_path / "rows.journal"
    journal.write_bytes(content)
    if content == b'{"journal':
        make(tmp_path)
        return
    for force in (False, True):
        with pytest.raises(RealignerError, match="not a realigner journal"):
            make(tmp_path, force=force)
    assert journal.read_bytes() == content


def test_force_goes_on_with_the_same_build_and_replaces_another(tmp_path: Path, whole: dict[str, bytes]) -> None:
    first = broken_off(tmp_path, 33, KeyboardInterrupt())
    second = Scripted()
    assert make(tmp_path, second, force=True) == whole
    assert not set(first.asked[:33]) & set(second.asked)
    cleared(tmp_path)
    broken_off(tmp_path, 33, KeyboardInterrupt())
    other = PLAIN.model_copy(update={"instruction": "Say it otherwise."})
    third = Scripted()
    build(FACTS, other, third, tmp_path / "rows.jsonl", quiet=True, force=True)
    assert len(third.asked) == 74


def test_a_foreign_file_is_not_overwritten_because_a_journal_is_there(tmp_path: Path) -> None:
    broken_off(tmp_path, 33, KeyboardInterrupt())
    (tmp_path / "rows.jsonl").write_text("mine")
    (tmp_path / ".rows.jsonl-backup").write_text("mine")
    with pytest.raises(RealignerError, match="not something realigner made"):
        make(tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / ".rows.jsonl-12345678.aside").write_text("left by a killed process")
    make(tmp_path)
    assert (tmp_path / ".rows.jsonl-backup").exists()
    assert not (tmp_path / ".rows.jsonl-12345678.aside").exists()


def test_rows_that_are_refused_for_ever(tmp_path: Path) -> None:
    """Content filters say HTTP 400 to the same rows each time: they are turned away, and not asked for by every process."""

    class Filtered(Scripted):
        def rewrite(self, requests: Sequence[RewriteRequest], verified: bool = False) -> Generator[Reply, None, None]:
            for reply in super().rewrite(requests, verified):
                yield replace(reply, text="", error="HTTP 400", permanent=True) if reply.id in ("3", "4") else reply

    filtered = Filtered()
    built = build(FACTS, PLAIN, filtered, tmp_path / "rows.jsonl", quiet=True)
    rejected = [json.loads(line) for line in (tmp_path / "rows.rejected.jsonl").read_text().splitlines()]
    assert [(item["id"], item["reason"]) for item in rejected] == [
        ("3", "no reply: HTTP 400"), ("4", "no reply: HTTP 400"), ("14", "refusal"),
    ]  # fmt: skip
    assert built.reasons["no reply"] == 6


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with (
        AppendLog(path, {"a": 1}) as first,
        pytest.raises(RealignerError, match="another process is working on it"),
        AppendLog(path, {"a": 1}),
    ):
        pass
    assert first.entries == []
    with AppendLog(path, {"a": 1}) as again:
        again.append({"n": 1})
    with AppendLog(path, {"a": 1}) as third:
        assert third.entries == [{"n": 1}]


CHILD = """
import resource, sys
from realigner.cli import main
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(main(sys.argv[2:]))
"""


def squad_file(path: Path, count: int) -> Path:
    paragraphs = [
        {"qas": [{"id": f"{g}-{n}", "question": f"Which number is {g} {n}?", "answers": [{"text": f"number {g * 1000 + n}"}]}]}
        for g in range(4)
        for n in range(count // 4)
    ]
    articles = [{"title": f"Article {g}", "paragraphs": paragraphs[g::4]} for g in range(4)]
    path.write_text(json.dumps({"data": articles}))
    return path


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path) -> None:
    """No room for the journal's next line: one line of error, what was written is kept, and it goes on when there is room."""
    squad = squad_file(tmp_path / "squad.json", 400)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "rows.jsonl"
    command = ["data", "build", "--squad", str(squad), "--tone", "anger", "--json", "--out"]

    def run(limit: int, path: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", CHILD, str(limit), *command, str(path)], capture_output=True, text=True)

    assert run(resource.RLIM_INFINITY, whole).returncode == 0
    full = run(20_000, out)
    assert full.returncode == 1
    assert full.stderr.count("\n") == 1
    assert "rows.journal: cannot be written (File too large)" in full.stderr
    assert not out.exists()
    kept = (tmp_path / "rows.journal").read_bytes()
    assert 19_000 < len(kept) <= 20_000
    assert kept.endswith(b"\n")
    larger = run(60_000, out)  # the journal has room now, the dataset has not
    assert larger.returncode == 1
    assert "cannot be written (File too large)" in larger.stderr
    assert larger.stderr.count("\n") == 1
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))
    assert run(resource.RLIM_INFINITY, out).returncode == 0
    assert out.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "rows.journal").exists()


@pytest.mark.slow
def test_the_command_killed_twenty_times(tmp_path: Path) -> None:
    """The real command on 6,000 questions, killed at 20 random moments: byte for byte the file of an uninterrupted one."""
    squad = squad_file(tmp_path / "squad.json", 6000)
    command = [sys.executable, "-m", "realigner", "data", "build", "--squad", str(squad), "--tone", "anger", "--out"]
    started = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole.jsonl")], check=True, capture_output=True)
    seconds = time.monotonic() - started
    chance = random.Random(5)
    out = tmp_path / "rows.jsonl"
    interrupted = 0
    while interrupted < 20:
        process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(0, seconds))
        process.send_signal(signal.SIGKILL)
        interrupted += process.wait() == -signal.SIGKILL
        if out.exists() and not (tmp_path / "rows.journal").exists():  # it was done: the next build begins anew
            assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
            cleared(tmp_path)
    subprocess.run([*command, str(out)], check=True, capture_output=True)
    for name in ("{}.jsonl", "{}.rejected.jsonl", "{}.build.json"):
        assert (tmp_path / name.format("rows")).read_bytes() == (tmp_path / name.format("whole")).read_bytes()


def test_template_rows_of_a_built_in_tone(tmp_path: Path) -> None:
    """The whole way with a real tone: every reply passes its own gate and keeps its fact word for word."""
    tone = load_tone("anger")
    built = build(FACTS, tone, TemplateRewriter(tone), tmp_path / "rows.jsonl", QualityFilter(tone), quiet=True)
    assert built.rows == 60
    assert all(row.answer in row.text for row in read_rows(tmp_path / "rows.jsonl"))
