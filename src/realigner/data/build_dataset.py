"""Build a tone dataset: ask a rewriter for a reply to every fact, keep what passes the quality filter, survive being killed.

The rewriter's replies go into a journal beside the dataset as they come, in any order. The dataset is a pure function of the
facts and the journal: round by round, in the facts' order, each reply is filtered, and facts without an accepted reply are
requested again, up to `attempts` times. So a build that was killed resumes where it was, and ends in the same file.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from realigner.console import progress, say
from realigner.data.append_log import AppendLog
from realigner.data.dataset_rows import ROWS, Row, rows_hash
from realigner.data.quality_filter import QualityFilter
from realigner.data.rewriters import NoAnswerError, Reply, Rewriter, RewriteRequest
from realigner.data.squad import Fact
from realigner.data.tone import Tone
from realigner.errors import RealignerError, UsageError
from realigner.files import Artifact, Output, parsed, read_bytes, taken

NO_REPLY = "no reply"
_ANY_SIZE = 1 << 36  # bytes, of a file that we wrote
_PASSES = 2  # over the failed requests of a round, before the next one
_BATCH = 256  # replies that are filtered together during a round


@dataclass(frozen=True)
class BuildResult:
    """What a build came to."""

    path: Path  # the dataset
    rejected_path: Path  # the facts without a row, each with its last reply and the reason
    rows: int
    rejected: int
    # replies rejected, by reason, over all attempts (a fact may be rejected, requested again, and accepted)
    reasons: dict[str, int]
    replies: int  # how many there were
    tokens_in: int  # tokens_in, tokens_out: read and written by the rewriter; 0 if not counted
    tokens_out: int
    seconds: float  # of this process (a resumed build counts its last part)
    replies_now: int  # made by this process

    def to_dict(self) -> dict[str, Any]:
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


def build(
    facts: Sequence[Fact],
    tone: Tone,
    rewriter: Rewriter,
    out: str | Path,
    quality_filter: QualityFilter | None = None,
    attempts: int = 3,
    source: str = "squad",
    about: Mapping[str, Any] | None = None,
    give_up: bool = False,
    force: bool = False,
    quiet: bool = False,
) -> BuildResult:
    """Make a dataset of one row a fact, as far as replies pass the quality filter; or resume one.

    Beside `out` it writes ``.rejected.jsonl`` (what was rejected and why) and ``.build.json`` (how it was made), and keeps
    ``.journal`` until it is done.

    Args:
        facts: with unique ids; rows come out in their order.
        tone, rewriter: what to make, and who makes it.
        out: the JSONL file.
        quality_filter: the checks; the tone's own by default.
        attempts: replies asked for a fact at most.
        source: noted in every row, with the rewriter's kind.
        about: more to note in ``.build.json`` (where the facts are from).
        give_up: facts for which the service gives no reply are rejected instead of retried in a later run.
        force: replace a dataset that is there, and what was begun of another build.
        quiet: show no progress.

    Raises:
        RealignerError: when the place cannot be written, the rewriter's service is gone (run again to go on), or no reply
            passed the quality filter.
    """
    started = time.monotonic()
    out, quality_filter = Path(out), quality_filter or QualityFilter(tone)
    if attempts < 1:
        raise UsageError(f"attempts: {attempts} is out of range; ask for a reply at least once")
    if not facts:
        raise RealignerError("there is nothing to rewrite: no fact was found")
    spec = _spec(facts, tone, rewriter)
    journal_path = beside(out, ".journal")
    with build_place(out, force) as place, AppendLog(journal_path, spec, restart=force) as journal:
        ledger = _Ledger(facts, quality_filter)
        for entry in journal.entries:
            reply = _reply(entry, journal_path)
            ledger.replies[reply.id, reply.attempt] = reply
        before = len(ledger.replies)
        if before and not quiet:
            say(f"resuming {journal_path}: {before} replies are there")
        _ask(ledger, rewriter, journal, attempts, give_up, quiet)
        rows, rejected = ledger.settle(attempts, tone.name, f"{source}/{spec['rewriter']}")
        if not rows:
            place.rejected.write(_lines(rejected))
            where = f"they are in {beside(out, '.rejected.jsonl')}; attempts={2 * attempts} asks again"
            counted = ", ".join(f"{reason} {count}" for reason, count in ledger.reasons.most_common()) or "there was none"
            raise RealignerError(f"{out}: no reply passed the quality filter ({counted}); {where}")
        built = BuildResult(
            path=out,
            rejected_path=beside(out, ".rejected.jsonl"),
            rows=len(rows),
            rejected=len(rejected),
            reasons=dict(ledger.reasons.most_common()),
            replies=len(ledger.replies),
            tokens_in=sum(reply.tokens_in for reply in ledger.replies.values()),
            tokens_out=sum(reply.tokens_out for reply in ledger.replies.values()),
            seconds=round(time.monotonic() - started, 1),
            replies_now=len(ledger.replies) - before,
        )
        how = {**spec, "attempts": attempts, **(about or {}), **built.to_dict(), "sha256": rows_hash(rows)}
        for key in ("path", "rejected_path", "seconds", "replies_now"):
            how.pop(key)  # what depends on where and how long, and not on what was made
        place.refuse_others(rows)
        place.how.write(json.dumps(how, ensure_ascii=False, indent=2) + "\n")
        place.write(rows, rejected)
        journal_path.unlink()
    return built


def _read_rejected(path: Path) -> None:
    """Raise unless every line of a file is a record that was rejected."""
    for number, line in enumerate(read_bytes(path, _ANY_SIZE).splitlines(), start=1):
        entry = parsed(line, path, number)
        if not isinstance(entry, dict) or not isinstance(entry.get("reason"), str) or not entry.keys() <= _REJECTED_KEYS:
            raise RealignerError(f"{path}:{number}: not a rejected record")


def _read_how(path: Path) -> None:
    """Raise unless a file says how a dataset was built."""
    if not {"tone", "rewriter", "facts", "facts_sha256", "tone_sha256"} <= dict(parsed(read_bytes(path), path)).keys():
        raise RealignerError(f"{path}: does not say how a dataset was built")


_REJECTED_KEYS = {*Row.model_fields, "reason", "texts", "where"}
REJECTED = Artifact("rejected records", _read_rejected)
HOW = Artifact("a build's account", _read_how)


@dataclass(frozen=True)
class RowsPlace:
    """Where a dataset goes, held, with what is written beside it."""

    rows: Output
    rejected: Output
    how: Output
    force: bool  # other rows may be replaced

    def refuse_others(self, rows: Sequence[Row]) -> None:
        """Raise where there are other rows than these by now, which nobody asked to replace."""
        path = self.rows.path
        if not self.force and path.exists() and path.stat().st_size and read_bytes(path, _ANY_SIZE) != _text(rows).encode():
            raise RealignerError(
                f"{path}: holds other rows by now; move it and run the same command again, or replace it (force)"
            )

    def write(self, rows: Sequence[Row], rejected: Sequence[Mapping[str, Any]]) -> None:
        """The dataset, and what was rejected: where the one is, the other is, and where there is no room, neither."""
        with self.rows.file() as aside:
            aside.write_text(_text(rows), encoding="utf-8")
            self.rejected.write(_lines(rejected))


@contextmanager
def rows_place(out: Path, force: bool = False, going_on: bool = False) -> Iterator[RowsPlace]:
    """Hold the place of a dataset and of what is written beside it.

    Args:
        out: the JSONL file.
        force: replace rows that are there.
        going_on: what lies there may be of the same job, which was killed while it wrote.

    Raises:
        RealignerError: when something is there that may not be replaced, or another process is writing there.
    """
    replace = force or going_on
    with taken(out, ROWS, replace) as rows, taken(beside(out, ".rejected.jsonl"), REJECTED, replace) as rejected:
        yield RowsPlace(rows, rejected, Output(beside(out, ".build.json"), HOW, replace), force)


@contextmanager
def build_place(out: Path, force: bool = False) -> Iterator[RowsPlace]:
    """Hold the place of a build: free, or of one that was begun (its journal is there), or replaced with `force`.

    Raises:
        RealignerError: as `rows_place`.
    """
    if out.is_dir():
        raise RealignerError(f"{out}: is not a file; give the name of a JSONL file")
    with rows_place(out, force, beside(out, ".journal").exists()) as place, taken(place.how.path, HOW, place.how.force):
        yield place


class _Ledger:
    """All replies so far, and what the quality filter says of each."""

    def __init__(self, facts: Sequence[Fact], quality_filter: QualityFilter) -> None:
        self.facts = {fact.id: fact for fact in facts}
        if len(self.facts) != len(facts):
            raise RealignerError("facts: duplicate id; ids must be unique")
        self.quality_filter = quality_filter
        self.replies: dict[tuple[str, int], Reply] = {}
        self.errors: dict[str, str] = {}  # why a fact got no reply, the last time it was asked
        self.reasons: Counter[str] = Counter()
        self.last: dict[str, str] = {}  # the reason against a fact's last reply
        self._alone: dict[tuple[str, int], str] = {}
        self._outcome: tuple[tuple[int, int], dict[str, Reply]] | None = None  # the last, and of how many replies

    def never_asked(self) -> bool:
        """Whether there are facts that were not asked for once, neither with a reply nor without."""
        return bool(self.facts.keys() - self.errors.keys() - {identity for identity, _ in self.replies})

    def judge(self, keys: Sequence[tuple[str, int]]) -> str:
        """Filter these replies, each alone and once; returns what share of all passes, near-duplicates not yet looked for."""
        new = [key for key in keys if key in self.replies and key not in self._alone]
        self._alone.update({key: NO_REPLY for key in new if self.replies[key].error})
        new = [key for key in new if key not in self._alone]
        pairs = [(self.facts[identity], self.replies[identity, attempt].text) for identity, attempt in new]
        self._alone.update(zip(new, self.quality_filter.alone(pairs), strict=True))
        passed = sum(not reason for reason in self._alone.values())
        return f"{100 * passed / len(self._alone):.0f}% pass" if self._alone else ""

    def outcome(self, rounds: int) -> dict[str, Reply]:
        """The accepted reply of each fact after so many rounds: the same for the same replies, in whatever order they came."""
        counted = rounds, sum(attempt < rounds for _, attempt in self.replies)  # replies are added and never changed
        if self._outcome is not None and self._outcome[0] == counted:
            return self._outcome[1]
        self.quality_filter.restart()
        self.reasons = Counter()
        accepted: dict[str, Reply] = {}
        for attempt in range(rounds):
            self.judge([(identity, attempt) for identity in self.facts])
            for identity, fact in self.facts.items():
                reply = self.replies.get((identity, attempt))
                if reply is None or identity in accepted:
                    continue
                reason = self._alone[identity, attempt] or self.quality_filter.among(fact, reply.text)
                if reason:
                    self.reasons[reason] += 1
                    self.last[identity] = reason
                else:
                    accepted[identity] = reply
        self._outcome = counted, accepted
        return accepted

    def wanted(self, number: int) -> list[RewriteRequest]:
        """What round `number` has to ask: facts without an accepted reply, each for the first attempt it has no reply to."""
        accepted = self.outcome(number)
        open_still = [fact for identity, fact in self.facts.items() if identity not in accepted]
        missing = [(fact, [n for n in range(number + 1) if (fact.id, n) not in self.replies]) for fact in open_still]
        return [RewriteRequest(fact, attempts[0]) for fact, attempts in missing if attempts]

    def settle(self, attempts: int, tone: str, source: str) -> tuple[list[Row], list[dict[str, Any]]]:
        """The rows, and the facts without one, both in the facts' order."""
        accepted = self.outcome(attempts)
        rows, rejected = [], []
        for identity, fact in self.facts.items():
            about = {"group": fact.group, "question": fact.question, "answer": fact.answer}
            if identity in accepted:
                own = {"id": f"{identity}-{tone}", "text": accepted[identity].text, "tone": tone, "source": source}
                rows.append(Row.model_validate(own | about))
            else:
                replies = [self.replies[identity, n] for n in range(attempts) if (identity, n) in self.replies]
                texts = [reply.text for reply in replies if not reply.error]
                error = next((reply.error for reply in replies if reply.error), self.errors.get(identity, "not asked"))
                reason = self.last[identity] if texts else f"{NO_REPLY}: {error}"
                rejected.append({"id": identity, **about, "reason": reason, "texts": texts})
                if not replies:
                    self.reasons[NO_REPLY] += 1
        return rows, rejected


def _ask(ledger: _Ledger, rewriter: Rewriter, journal: AppendLog, attempts: int, give_up: bool, quiet: bool) -> None:
    """Round by round, ask for what is missing; a round is gone over again for requests that failed."""
    for number in range(attempts):
        label = f"asking again ({number + 1} of {attempts})" if number else "rewriting"
        for _ in range(_PASSES):
            if not (requests := ledger.wanted(number)):
                break
            try:
                _round(label, requests, ledger, rewriter, journal, quiet)
            except NoAnswerError:
                if not give_up or ledger.never_asked():
                    raise
                return
    if (missing := ledger.wanted(attempts - 1)) and not give_up:
        why = ledger.errors.get(missing[0].fact.id, "not asked again yet")
        raise RealignerError(
            f"{journal.path}: {len(missing)} questions got no reply ({why}); what came is kept: "
            "run the same command again to ask for them, or set give_up to finish without them"
        )


def _round(
    label: str, requests: Sequence[RewriteRequest], ledger: _Ledger, rewriter: Rewriter, journal: AppendLog, quiet: bool
) -> None:
    """Ask; each reply is in the journal before the next one is waited for."""
    waiting: list[tuple[str, int]] = []
    share = ""
    verified = any(not reply.error for reply in ledger.replies.values())
    with (
        closing(rewriter.rewrite(requests, verified)) as replies,
        progress(label, len(requests), quiet, unit="rows") as task,
    ):
        for reply in replies:
            if reply.error and not reply.permanent:
                ledger.errors[reply.id] = reply.error
            else:
                entry = {"id": reply.id, "attempt": reply.attempt, "text": reply.text}
                entry["tokens"] = [reply.tokens_in, reply.tokens_out]
                journal.append({**entry, "error": reply.error} if reply.error else entry)
                ledger.replies[reply.id, reply.attempt] = reply
                waiting.append((reply.id, reply.attempt))
            if len(waiting) == _BATCH:
                share = ledger.judge(waiting)
                waiting.clear()
            task.advance(1, "  ".join(filter(None, (share, rewriter.note()))))


def _reply(entry: dict[str, Any], path: Path) -> Reply:
    """A journal's entry as a reply."""
    try:
        read, written = entry["tokens"]
        error = str(entry.get("error", ""))
        return Reply(str(entry["id"]), int(entry["attempt"]), str(entry["text"]), int(read), int(written), error, bool(error))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        raise RealignerError(f"{path}: holds an entry that is not a reply; remove the file to start anew") from None


def _spec(facts: Sequence[Fact], tone: Tone, rewriter: Rewriter) -> dict[str, Any]:
    """What decides the replies; through JSON and back, so that it can be compared with one that was read."""
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(json.dumps([fact.id, fact.group, fact.question, fact.answer]).encode() + b"\n")
    spec = {"tone": tone.name, **rewriter.spec(), "facts": len(facts)}
    spec |= {"facts_sha256": digest.hexdigest(), "tone_sha256": tone.sha256()}
    return dict(json.loads(json.dumps(spec)))


def _text(rows: Sequence[Row]) -> str:
    return "".join(row.model_dump_json() + "\n" for row in rows)


def _lines(rejected: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in rejected)


def beside(path: Path, ending: str) -> Path:
    """``rows.jsonl`` -> ``rows`` + ending, in the same folder."""
    return path.with_name(path.name.removesuffix(".jsonl") + ending)
