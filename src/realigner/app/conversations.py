"""What the app's users have said, session by session, and what is being answered."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from realigner.app.exchange import SIDES, Exchange, Message
from realigner.app.live_map import LiveMap
from realigner.errors import UsageError

_SESSIONS = 200  # conversations that are remembered; the one that was longest unused goes first


@dataclass
class Conversation:
    """What one user has said, on both sides, and the newest exchange."""

    messages: dict[str, list[Message]] = field(default_factory=lambda: {side: [] for side in SIDES})
    cut: dict[str, set[int]] = field(default_factory=lambda: {side: set() for side in SIDES})  # places of replies in messages
    exchange: Exchange | None = None
    ended: bool = False  # forgotten: its page was closed, or began a new one

    def settle(self) -> None:
        """Put the newest exchange, which is over, into the conversation."""
        if self.exchange is not None:
            self.cut = {side: self._cut(self.exchange, side) for side in SIDES}
            self.messages = {side: self.exchange.kept(side) for side in SIDES}

    def shown(self, side: str) -> list[Message]:
        """One side as the page shows it: replies that were cut at their most tokens end in `` ...``."""
        exchange = self.exchange
        if exchange is None:
            return [*self.messages[side]]
        asked, reply = Message(role="user", content=exchange.asked.text), exchange.replies[side] or "…"
        said = [*exchange.asked.history.get(side, ()), asked, Message(role="assistant", content=reply)]
        cut = self._cut(exchange, side)
        return [{**one, "content": f"{one['content']} ..."} if at in cut else one for at, one in enumerate(said)]

    def _cut(self, exchange: Exchange, side: str) -> set[int]:
        before = len(exchange.asked.history.get(side, ()))
        return {at for at in self.cut[side] if at < before} | ({before + 1} if side in exchange.cut else set())


class Conversations:
    """The conversations by session; those that are long unused are forgotten."""

    def __init__(self) -> None:
        self._found: OrderedDict[str, Conversation] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, session: str | None) -> Conversation:
        """The conversation of a session, begun where there is none."""
        with self._lock:
            found = self._found.setdefault(str(session), Conversation())
            self._found.move_to_end(str(session))
            while len(self._found) > _SESSIONS:
                self._ended(next(iter(self._found)))
            return found

    def end(self, session: str | None) -> None:
        """Stop and forget a conversation."""
        with self._lock:
            self._ended(str(session))

    def _ended(self, name: str) -> None:
        gone = self._found.pop(name, None)
        if gone is None:
            return
        gone.ended = True
        if gone.exchange is not None:
            gone.exchange.stop()

    def stop(self) -> None:
        """Stop and forget them all."""
        with self._lock:
            for name in list(self._found):
                self._ended(name)

    def lives(self) -> set[str]:
        """The ids of all maps that `live` can give."""
        with self._lock:
            exchanges = [conversation.exchange for conversation in self._found.values()]
            return {own.live.id for own in exchanges if own is not None and own.live is not None}

    def live(self, name: Any) -> LiveMap:
        """The maps of a reply by their id.

        Raises:
            UsageError: when they are forgotten.
        """
        with self._lock:
            for conversation in self._found.values():
                exchange = conversation.exchange
                if exchange is not None and exchange.live is not None and exchange.live.id == name:
                    return exchange.live
        raise UsageError("The maps of this reply are gone; ask again.")
