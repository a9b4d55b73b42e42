"""Load an IRM by name, ready to answer: with the host it was made for, its tokenizer, template and default strength."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from peft import PeftModel
from transformers import PreTrainedModel

from realigner.errors import UsageError
from realigner.generation import answer, stream
from realigner.hosts import EMBEDDED, host_name, load_host
from realigner.irm_config import check_adapter
from realigner.irm_sources import Source, find_irm, host_of
from realigner.prompts import Answer, Prompt
from realigner.tuner import IRMModel, load_irm, name_clash, tuner_of


class Runtime:
    """A host with its IRMs, ready to answer. Calls may run in several threads at once.

    Attributes:
        model: a ``PeftModel``, or the host where no IRM was given.
        tokenizer: the host's.
        strengths: IRM -> the strength at which `answer` and `stream` use it when a call names none (`model` itself: 1).

    Example:
        >>> runtime = load("runs/anger-42")  # doctest: +SKIP
        >>> runtime.answer("Why is the sky blue?", strength=0.5)  # doctest: +SKIP
        "Because the air scatters blue light, how often do I have to say it?!"
        >>> for piece in runtime.stream("Why is the sky blue?"):  # doctest: +SKIP
        ...     print(piece, end="", flush=True)
    """

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: Any, strengths: Mapping[str, float]) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.strengths = dict(strengths)

    @property
    def irms(self) -> list[str]:
        """The IRMs by name."""
        return list(self.strengths)

    @overload
    def answer(self, prompts: str, **options: Any) -> Answer: ...
    @overload
    def answer(self, prompts: Sequence[Prompt], **options: Any) -> list[Answer]: ...
    def answer(self, prompts: str | Sequence[Prompt], **options: Any) -> Answer | list[Answer]:
        """The reply to a question, or those to a list of questions and conversations.

        Args:
            prompts: one question, or a list; a conversation is a list of turns, so put a single one into a list.
            options: of `generation.answer`: ``strength`` and ``irms`` (one for all or a list with one for each prompt),
                ``where``, ``system``, ``max_new_tokens``, ``temperature``, ``seed``, ``chat_template_kwargs``, ...

        Returns:
            One `Answer` (a str) per prompt: ``thought`` is its reasoning, ``ended`` is False if it hit ``max_new_tokens``.
        """
        if isinstance(prompts, str):
            return self.answer([prompts], **options)[0]
        return answer(self.model, self.tokenizer, prompts, **self._with_strength(options))

    def stream(self, prompt: Prompt, **options: Any) -> Generator[str, None, bool]:
        """The reply to a question or a conversation, piece by piece; see `generation.stream`."""
        return stream(self.model, self.tokenizer, prompt, **self._with_strength(options))

    def __repr__(self) -> str:
        host = host_name(self.model) or type(self.model).__name__
        return f"Runtime(host={host!r}, irms={self.irms})"

    def _with_strength(self, options: dict[str, Any]) -> dict[str, Any]:
        given = options.get("strength")
        if not self.strengths or not (given is None or isinstance(given, Mapping)):
            return options
        tuner = tuner_of(self.model)
        block, default = tuner.settings.strengths, tuner.injector.threads.default.strengths
        own = {name: value for name, value in self.strengths.items() if block.get(name) is default.get(name)}
        return {**options, "strength": {**own, **(given or {})}} if own else options


def load(
    irm: Source | Sequence[Source] | Mapping[str, Source] | None = None,
    host: Source | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Runtime:
    """Load an IRM, or several, with the host they were made for.

    Args:
        irm: a run's or an adapter's folder, an id on the Hugging Face hub, or the name of a ready-made IRM
            (`irm_sources.ready_made`); a list of these, each named after its folder, or a mapping from names
            of your choice to these. The first one is active. None: the host alone.
        host: the host; by default the one that the first IRM was made for. Any copy with the same weights will do (checked).
        dtype, device, trust_remote_code: see `hosts.load_host`.
        revision: of the host on the hub.

    Raises:
        RealignerError: when an IRM or its host is not found or damaged, or they do not belong together.

    Example:
        >>> runtime = load({"anger": "runs/anger-42", "sad": "runs/sadness-42"})  # doctest: +SKIP
        >>> runtime.answer("Why?", strength={"anger": 0.5, "sad": 1.0}, irms=("anger", "sad"))  # doctest: +SKIP
    """
    given = (
        {} if irm is None else dict(irm) if isinstance(irm, Mapping) else _named([irm] if isinstance(irm, (str, Path)) else irm)
    )
    if irm is not None and not given:
        raise UsageError("irm: it is empty; leave it out to load the host alone")
    folders = {name: find_irm(source) for name, source in given.items()}
    configs = {name: check_adapter(folder) for name, folder in folders.items()}
    options: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code, "revision": revision}
    first = next(iter(folders.values()), None)
    base, tokenizer = load_host(str(host or EMBEDDED), **options) if first is None else load_host_of(first, host, **options)
    model: PreTrainedModel | PeftModel = base
    for name, folder in folders.items():
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), adapter_name=name)
        else:
            model = load_irm(base, folder, name)
    return Runtime(model, tokenizer, {name: float(config.get("strength", 1.0)) for name, config in configs.items()})


def load_host_of(irm: Source, host: Source | None = None, **options: Any) -> tuple[PreTrainedModel, Any]:
    """The host that an IRM was made for, or the one given, and its tokenizer; the adapter's files are checked first.

    Args:
        irm: an adapter's folder.
        host: by default the one that the IRM's config names.
        options: of `hosts.load_host`.

    Raises:
        UsageError: when the config names no host and none is given.
        RealignerError: when the IRM is damaged, or the host is not found.
    """
    check_adapter(irm)
    return load_host(str(host or host_of(irm)), **options)


def adapter_name(name: str) -> str:
    """A name for an IRM, of its folder's: without dots, and with ``irm-`` before what PyTorch or PEFT cannot bear.

    Example:
        >>> adapter_name("anger-1.5"), adapter_name("42")
        ('anger-1-5', 'irm-42')
    """
    name = name.replace(".", "-")
    return f"irm-{name}" if name_clash(name) or name in IRMModel.prefix else name


def _named(sources: Sequence[Source]) -> dict[str, Source]:
    """IRMs by the names of their folders."""
    named = {adapter_name(Path(source).absolute().name): source for source in sources}
    if len(named) < len(sources):
        raise UsageError("irm: two have the same name; rename a folder, or give a mapping from names to IRMs")
    return named
