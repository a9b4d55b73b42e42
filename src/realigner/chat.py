"""A conversation with a host and its IRMs, in which the strength and the IRMs may change between the turns."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from realigner.errors import UsageError
from realigner.generation import Thought, format_of
from realigner.runtime import Runtime
from realigner.settings import check_strength


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation, and the settings of its reply.

    Attributes:
        prompt: what the user said.
        reply: what was answered; of a reply that was stopped, what there was of it.
        thought: what the host thought before it; empty on hosts that do not think.
        irms: the IRMs that acted; none: the bare host answered.
        strength: at which they acted, a number or one for each IRM by name; None where none acted.
        stopped: whether the reply was stopped before its end.
        ended: whether it came to its end: it was not stopped, nor cut at ``max_new_tokens``.
    """

    prompt: str
    reply: str
    thought: str
    irms: tuple[str, ...]
    strength: float | dict[str, float] | None
    stopped: bool
    ended: bool


class Chat:
    """A multi-turn conversation.

    Each reply is generated from the whole conversation so far with the current settings, as `Runtime.answer` would for those
    messages. Thoughts are not part of the conversation.

    Args:
        runtime: the host and its IRMs; the first one acts.
        strength: of the IRMs that act; None: each at its own.
        system: a system prompt.
        options: of `generation.stream`, for every reply.

    Attributes:
        messages: the conversation so far, as `answer` takes it; the system prompt is not in it.
        turns: its turns with their settings.
        irms: the names of the IRMs that act; empty for the bare host.
        strength, system: as the arguments.

    Raises:
        UsageError: where conversations are in the plain form, which has no turns.

    Example:
        >>> chat = Chat(load("runs/anger-42"))  # doctest: +SKIP
        >>> print("".join(chat.say("Where is Prague?")))  # doctest: +SKIP
        On the Vltava, where it has always been!
        >>> chat.set_strength(0.5)  # doctest: +SKIP
        >>> print("".join(chat.say("And how do I get there?")))  # doctest: +SKIP
        By train, as anybody knows.
    """

    def __init__(self, runtime: Runtime, strength: float | None = None, system: str | None = None, **options: Any) -> None:
        if format_of(runtime.model, runtime.tokenizer).is_plain:
            raise UsageError(
                "chat: prompts of this host or IRM are in the plain form, which has no turns; ask single questions"
            )
        self.runtime = runtime
        self.options = options
        self.messages: list[dict[str, str]] = []
        self.turns: list[Turn] = []
        self.irms: tuple[str, ...] = tuple(runtime.irms[:1])
        self.strength: float | None = None
        self.system = system
        if strength is not None:
            self.set_strength(strength)

    @property
    def acting(self) -> dict[str, float]:
        """The IRMs that act, each with its strength."""
        return {name: self.runtime.strengths[name] if self.strength is None else self.strength for name in self.irms}

    def use(self, *irms: str) -> None:
        """Choose the IRMs that act from now on (several are summed); without names, the bare host answers.

        Raises:
            UsageError: for a name that no IRM has.
        """
        known = self.runtime.irms
        if unknown := [name for name in irms if name not in known]:
            raise UsageError(f"irm: there is no {unknown[0]!r}; there are {', '.join(known) or 'none'}")
        self.irms = tuple(dict.fromkeys(irms))

    def set_strength(self, strength: float) -> None:
        """Scale the IRMs from now on; 0 is the bare host, 1 an IRM as trained.

        Raises:
            UsageError: unless it is a number from -1000 to 1000.
        """
        check_strength(strength)
        self.strength = float(strength)

    def reset(self) -> None:
        """Clear the conversation; the settings stay."""
        self.messages, self.turns = [], []

    def say(self, text: str) -> Generator[str]:
        """Send a message and stream the reply; pieces of its reasoning are yielded as `Thought`.

        The turn is kept when the pieces end, and also when they are stopped (by closing the iterator, or by Ctrl-C): then with
        what there is of the reply. A turn without a reply is left out, and so is one that failed.

        Raises:
            UsageError: when the text is empty.
            RealignerError: as `generation.answer` does, for example when the conversation has become too long.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        stopped, ended = True, False
        before, irms, acting = self.messages, self.irms, self.acting
        reading = self.runtime.stream(asked, system=self.system, thoughts=True, **self._settings(), **self.options)
        try:
            with closing(reading):
                while True:
                    pieces.append(next(reading))
                    yield pieces[-1]
        except StopIteration as end:
            stopped, ended = False, bool(end.value)
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException:
            pieces.clear()
            raise
        finally:
            if self.messages is before:  # not forgotten meanwhile
                self._keep(asked, pieces, irms, acting, stopped, ended)

    def _settings(self) -> dict[str, Any]:
        if not self.runtime.irms:
            return {}
        return {"irms": self.irms or "__base__", "strength": self.acting or None}

    def _keep(
        self,
        asked: list[dict[str, str]],
        pieces: list[str],
        irms: tuple[str, ...],
        acting: dict[str, float],
        stopped: bool,
        ended: bool,
    ) -> None:
        reply = "".join(piece for piece in pieces if not isinstance(piece, Thought))
        if not reply.strip():
            return
        thought = "".join(piece for piece in pieces if isinstance(piece, Thought)).strip()
        same = set(acting.values())
        strength = next(iter(same)) if len(same) == 1 else acting or None
        self.messages = [*asked, {"role": "assistant", "content": reply}]
        self.turns.append(Turn(asked[-1]["content"], reply, thought, irms, strength, stopped, ended))
