"""Replies by a host that is loaded here, recorded as they are made."""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from realigner.app.exchange import Asked, Exchange, Limits, Reader
from realigner.app.live_map import LiveMap
from realigner.errors import UsageError
from realigner.generation import format_of
from realigner.prompts import Prompt
from realigner.runtime import Runtime
from realigner.settings import NO_IRM
from realigner.traces.collect import seed_of
from realigner.traces.layout import RunLabel
from realigner.traces.recording import record
from realigner.training.run_dir import read_run
from realigner.tuner import find_tuner


class RuntimeTalker:
    """A `Talker` on a runtime. Several threads may ask at once, each with its own settings.

    Args:
        runtime: the host and its IRMs.
        limits: what users may ask for.
        host: what the page calls the host.
        folders: IRM -> its folder, for the labels of recordings.

    Example:
        >>> talker = RuntimeTalker(load({"anger": "runs/anger-42"}))  # doctest: +SKIP
        >>> talker.begin(Asked("Why is the sky blue?", strengths={"anger": 0.5})).wait()  # doctest: +SKIP
        {'base': 'The sky is blue because ...', 'realigned': 'Because the air scatters ...'}
    """

    def __init__(
        self, runtime: Runtime, limits: Limits | None = None, host: str = "", folders: Mapping[str, Path] | None = None
    ) -> None:
        self.runtime = runtime
        self.limits = limits or Limits()
        self.strengths = dict(runtime.strengths)
        self.has_turns = not format_of(runtime.model, runtime.tokenizer).is_plain
        self.note = ""
        self.layers: tuple[int, ...] = ()
        self.neurons = 0
        self._layers_of: dict[str, tuple[int, ...]] = {}
        self._labels: dict[str, RunLabel] = {}
        tuner = find_tuner(runtime.model)
        self.host = host or (tuner.fingerprint.name if tuner is not None else "")
        if tuner is not None:
            for name in runtime.irms:
                config = tuner.peft_config[name]
                self._layers_of[name] = tuple(config.resolved_layers(len(tuner.sites.layers)))
                folder = (folders or {}).get(name)
                seed = 0 if folder is None else seed_of(read_run(folder))
                self._labels[name] = RunLabel(name, config.tone or name, seed, irm="" if folder is None else str(folder))
            self.layers = tuple(sorted({layer for own in self._layers_of.values() for layer in own}))
            self.neurons = tuner.sites.width

    def begin(self, asked: Asked) -> Exchange:
        """Begin both replies.

        Raises:
            UsageError: for a question or settings beyond the limits, or IRMs that do not go together.
            RealignerError: for a conversation that the host's chat template refuses.
        """
        asked.check(self.limits)
        if unknown := [name for name in asked.strengths if name not in self.strengths]:
            raise UsageError(f"There is no IRM {unknown[0]!r} here.")
        live = None
        if asked.acting:
            layers = {name: self._layers_of[name] for name in asked.acting}
            live = LiveMap(layers, self.layers, self.neurons, lambda token: str(self.runtime.tokenizer.decode([token])))
        for side in ("base", "realigned"):
            self._check_length(asked, side)
        return Exchange(asked, {"base": self._base(asked), "realigned": self._realigned(asked, live)}, live)

    def _prompt(self, asked: Asked, side: str) -> Prompt:
        """A conversation; the question, where nothing was said before, or the host has no chat template."""
        conversation = asked.conversation(side)
        return conversation if self.has_turns and len(conversation) > 1 else asked.text

    def _check_length(self, asked: Asked, side: str) -> None:
        chat_format = format_of(self.runtime.model, self.runtime.tokenizer, None, tuple(asked.acting) or None)
        tokens = len(chat_format.prompts([self._prompt(asked, side)])[0])
        if tokens > self.limits.context:
            raise UsageError(
                f"The conversation has {tokens:,} tokens, and at most {self.limits.context:,} are read here; begin a new one."
            )

    def _options(self, asked: Asked) -> dict[str, Any]:
        names = ("max_new_tokens", "temperature", "top_p", "seed")
        return {name: getattr(asked, name) for name in names}

    def settings(self, asked: Asked, side: str) -> dict[str, Any]:
        """The arguments with which `Runtime.answer` gives one side's reply to `_prompt`."""
        options = self._options(asked)
        if side == "realigned" and asked.acting:
            return {**options, "irms": tuple(asked.acting), "strength": asked.acting}
        return {**options, "irms": NO_IRM} if self.strengths else options

    def _pieces(self, asked: Asked, side: str, stop: threading.Event) -> Generator[str, None, bool]:
        stream = self.runtime.stream(self._prompt(asked, side), stop=stop, **self.settings(asked, side))
        with closing(stream) as pieces:
            return (yield from pieces)

    def _base(self, asked: Asked) -> Reader:
        return lambda stop: self._pieces(asked, "base", stop)

    def _realigned(self, asked: Asked, live: LiveMap | None) -> Reader:
        if live is None:
            return lambda stop: self._pieces(asked, "realigned", stop)

        def read(stop: threading.Event) -> Generator[str, None, bool]:
            prompt = self._prompt(asked, "realigned")
            labels = {name: self._labels[name] for name in asked.acting}
            how: dict[str, Any] = {"labels": labels, "questions": [prompt], "watch": live.add}
            with record(self.runtime.model, self.runtime.tokenizer, "raw", **how) as trace:
                ended = yield from self._pieces(asked, "realigned", stop)
            live.settle(trace)
            return ended

        return read
