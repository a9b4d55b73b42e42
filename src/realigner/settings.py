"""How IRMs act in one call: which, at what strength, in which rows, at which tokens.

Settings are per thread: a `Threads.using` block applies to calls in its own thread and in threads started inside it, and to no
others. A forward or a generation uses the settings in effect when it starts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from realigner.errors import RealignerError, UsageError

NO_IRM = "__base__"  # PEFT's word for a row without an adapter
Number = float | Sequence[float] | Sequence[Sequence[float]] | torch.Tensor
Strength = Number | Mapping[str, Number]
Where = str | int
WHERES = ("all", "prompt", "reply")


@dataclass(eq=False)
class Generation:
    """One call of ``generate``.

    Attributes:
        prompt: tokens of the prompt, padding included; what comes after is the reply.
        repeats: how often each row of the batch is repeated (beams, several replies a prompt).
        seen: tokens that went through the decoder; counted for hosts whose cache does not know its length.
    """

    prompt: int
    repeats: int = 1
    seen: int = 0


@dataclass(frozen=True, eq=False)
class Settings:
    """How the IRMs of a host act in a call.

    Attributes:
        strengths: IRM -> its strength, of shape [], [row] or [row, position].
        rows: IRM -> 1 in the rows of the batch that it acts on, of shape [row]; None: the active IRMs act on all rows.
        where: ``"all"``, ``"prompt"``, ``"reply"``, or N for the first N tokens of the reply.
        irms: the IRMs that take part; None: those that are active when a forward begins.
        generation: the generation that the call is a part of.
        packed: whether strengths are given per token of this forward, whose tokens belong to several requests (continuous
            batching).
        observers: called with what each IRM adds, as `injection.Injector.observers` are.
    """

    strengths: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, torch.Tensor] | None = None
    where: Where = "all"
    irms: tuple[str, ...] | None = None
    generation: Generation | None = None
    packed: bool = False
    observers: tuple[Callable[..., None], ...] = ()

    @property
    def by_token(self) -> bool:
        """Whether tokens of one row may differ, so that the place of each in its text matters."""
        return self.where != "all" or any(strength.dim() == 2 for strength in self.strengths.values())

    def factor(self, strength: torch.Tensor, batch: int, positions: int, start: int | torch.Tensor) -> torch.Tensor:
        """What a delta ``[batch, position, layer, neuron]`` of this forward is multiplied by, in a shape that broadcasts.

        Args:
            strength: of one IRM, of shape [], [row] or [row, position].
            batch, positions: of the forward.
            start: the first token's place in its text.

        Raises:
            UsageError: for strengths of another number of rows or tokens than the batch has.
        """
        if strength.dim() == 0 and self.where == "all":
            return strength
        if strength.dim() > 0:
            rows, repeats = strength.shape[0], 1 if self.generation is None else self.generation.repeats
            if batch != rows * repeats:
                each = "row" if repeats == 1 else f"prompt, not for each of its {repeats} rows"
                raise UsageError(
                    f"strength or adapter_names: {rows} given for a batch of {batch} rows; give one for each {each}"
                )
            strength = strength.repeat_interleave(repeats, dim=0)
        strength = self._of_tokens(strength, positions, start) if strength.dim() == 2 else strength[..., None]
        if self.where != "all":
            strength = strength * self._acts(positions, start, strength.device)
        return strength[..., None, None]

    def _of_tokens(self, strength: torch.Tensor, positions: int, start: int | torch.Tensor) -> torch.Tensor:
        """The columns of ``strength [row, position]`` that this forward's tokens have; the last one holds for the rest."""
        width = strength.shape[1]
        if self.packed:
            return strength[:, :positions]
        if self.generation is not None:
            return strength[:, _places(positions, start, strength.device).clamp(max=width - 1)]
        if width != positions:
            raise UsageError(f"strength: {width} given for {positions} tokens of a row; give one for each token")
        return strength

    def _acts(self, positions: int, start: int | torch.Tensor, device: torch.device) -> torch.Tensor:
        """Whether IRMs act on each token ``[position]``."""
        if self.generation is None:
            raise UsageError(f"where={self.where!r}: only generate knows prompt from reply; give a strength for each token")
        acting: torch.Tensor = acts(self.where, _places(positions, start, device) - self.generation.prompt)
        return acting


def acts(where: Where, after: Any) -> Any:
    """Whether IRMs act on a token; `after` is its offset from the reply's first token (a number or a tensor)."""
    if where == "all":
        return after == after
    if where == "prompt":
        return after < 0
    return (after >= 0) if where == "reply" else (after >= 0) & (after < int(where))


def _places(positions: int, start: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.arange(positions, device=device) + (start.to(device) if isinstance(start, torch.Tensor) else start)


def check_where(where: Where) -> Where:
    """Raise UsageError unless `where` is one of `WHERES` or a number of tokens."""
    if where in WHERES or (isinstance(where, int) and not isinstance(where, bool) and where >= 0):
        return where
    raise UsageError(f"where: {where!r} is not one of {', '.join(WHERES)}, or how many tokens of the reply")


def check_strength(value: Any, device: torch.device | str = "cpu") -> torch.Tensor:
    """A strength as a tensor of shape [], [row] or [row, position].

    Raises:
        UsageError: for any other type or shape, or a number outside -1000 to 1000.
    """
    try:
        if _has_truth_values(value):
            raise TypeError
        tensor = torch.as_tensor(value, dtype=torch.float32, device=device).detach().clone()  # not the caller's memory
    except (TypeError, ValueError, RuntimeError):
        tensor = torch.tensor(float("nan"))
    if tensor.dim() > 2 or tensor.numel() == 0 or not bool((tensor.abs() <= 1000).all()):
        raise UsageError(
            f"strength: {value!r} is not a number between -1000 and 1000, a list with one for each row, or a list of lists "
            "with one for each token"
        )
    return tensor


def _has_truth_values(value: Any) -> bool:
    """Whether True or False stands among what should be numbers."""
    if isinstance(value, (list, tuple)):
        return any(map(_has_truth_values, value))
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def part_of(value: Any, at: int | slice, count: int, name: str, unit: str) -> Any:
    """The entries at `at` of a setting given as a list, tuple or array with one per prompt (or request).

    A single value is returned as it is, and so is a tuple of names, which is one mix of IRMs.

    Raises:
        UsageError: for a list whose length is not `count`; the message uses `name` and `unit`.
    """
    if isinstance(value, Mapping):
        return {key: part_of(item, at, count, name, unit) for key, item in value.items()}
    if isinstance(value, tuple) and not any(isinstance(item, str) for item in value):
        value = list(value)
    if not isinstance(value, list) and not getattr(value, "ndim", 0):
        return value
    if len(value) != count:
        raise UsageError(f"{name}: {len(value)} given for {count} {unit}; give one for each")
    return value[at]


def generate_setting(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], own: Any) -> Any:
    """What a call of ``generate`` uses for a setting: its keyword, else the config it is given, else the host's own.

    Args:
        name: as in transformers' ``GenerationConfig``.
        args, kwargs: of the call; a config may be its second argument.
        own: the host's ``generation_config``, which fills in what a given one leaves open.
    """
    if name in kwargs:
        return kwargs[name]
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    value = getattr(config, name, None)
    return getattr(own, name, None) if value is None else value


# --- threads ----------------------------------------------------------------------------------------------------------------


class ThreadState:
    """What one thread is about to do, or is doing, with the IRMs of one host.

    Attributes:
        settings: of the next call.
        running: the context of the forward that is under way, or of the one that is being recomputed.
        began: whether a forward of the decoder began since this was last set to False.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.running: Any = None
        self.began = False


class Threads(threading.local):
    """One host's settings, thread by thread.

    Attributes:
        state: of the calling thread.
    """

    def __init__(self, default: Settings) -> None:
        self.default = default
        # An object of its own: the compiler does not follow writes to a thread's locals.
        self.state = ThreadState(self._of_innermost(_blocks.open))

    def __reduce__(self) -> tuple[type[Threads], tuple[Settings]]:
        return Threads, (self.default,)  # copied and pickled without what threads are about to do

    def _of_innermost(self, opened: Sequence[tuple[Threads, Settings]]) -> Settings:
        return next((settings for owner, settings in reversed(opened) if owner is self), self.default)

    @contextmanager
    def using(self, settings: Settings, may_overlap: bool = False) -> Iterator[None]:
        """Make these the settings of this thread, and of threads begun in the block.

        Args:
            settings: of the block.
            may_overlap: whether blocks within it may outlast it (they then keep what they took over from it).

        Raises:
            RealignerError: when blocks overlap instead of nesting, as those of two coroutines in one thread can.
        """
        _inherit()
        state = self.state
        state.settings = settings
        opened, entry = _blocks.open, (self, settings)
        opened.append(entry)
        try:
            yield
        finally:
            nested = state.settings is settings
            opened.remove(entry)
            state.settings = self._of_innermost(opened)
        if not (nested or may_overlap):
            raise RealignerError("blocks of settings overlap in one thread (coroutines?); give strength= to the call instead")


class _Blocks(threading.local):
    """The blocks that a thread is in: its own, and those that it was begun in."""

    def __init__(self) -> None:
        self.open: list[tuple[Threads, Settings]] = list(getattr(threading.current_thread(), "_irm_blocks", ()))


_blocks = _Blocks()


@cache
def _inherit() -> None:
    """From now on a thread begins with the settings of the block that it is begun in, so that a streamer's thread has them.

    Python does this for context variables from 3.14 on, where asked to. Workers of a pool are left out: they outlive the block.
    """
    start = threading.Thread.start

    def start_with_settings(thread: threading.Thread) -> None:
        work = getattr(thread, "_target", None) or type(thread)  # anyio's workers (of FastAPI) are a class of threads
        pool = getattr(work, "__module__", "") in (
            "concurrent.futures.thread",
            "multiprocessing.pool",
            "anyio._backends._asyncio",
        )
        if _blocks.open and not pool:
            thread._irm_blocks = tuple(_blocks.open)  # type: ignore[attr-defined]
        start(thread)

    threading.Thread.start = start_with_settings  # type: ignore[method-assign, assignment]
