"""The recipe: everything that decides a run, in one flat list of keys; read from YAML, changed by ``key=value``.

Two come with the package: ``default``, and ``paper`` (Smith et al. 2024 and its public code). A run's folder holds its own as
``recipe.yaml``, with every key resolved, so that it can be repeated.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from realigner.chat_format import check_template_kwargs
from realigner.errors import RealignerError, UsageError
from realigner.files import decoded, read_bytes

if TYPE_CHECKING:
    from realigner.irm import IRMShape

BUILT_IN = ("default", "paper")
_FOLDER = Path(__file__).parent / "recipes"
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)  # of PyYAML, for tags that do not fit
MOST_YAML = 1 << 18  # characters of a YAML file
_DIGITS = 400  # of a number
RUNTIME_ONLY_KEYS = frozenset({"device", "threads", "report_to"})  # where and how fast a run goes, not what it is
SCALES = ("input_scale", "delta_scale")  # keys that are measured where they are null, with the compact preset
_NEWEST = 2  # edition of the compact preset (irm.EDITIONS)
# Of the compact preset: without dropout some hundred rows are learned by heart in two epochs (docs/presets.md).
_DROPOUT = 0.6
DEFAULT_RATE, PAPER_RATE = 1e-2, 1e-4  # learning rates of the presets
_OF_DEFAULT = 0.3  # the share of the default that imitating a teacher takes: its distributions are near the host's own
_HOST_WIDTH, _IRM_WIDTH = 576, 256  # SmolLM2's and its first compact IRM's: up to these the first is taken whole
_WRITTEN_OUT = 30  # keys of a file that is a run's own, with every key that there was
# Keys that came later, with what runs did before: those that a run's own recipe lacks, and a hash leaves out.
LATER_KEYS: dict[str, Any] = {
    "instruct": None,
    "questions": "authored",
    "teacher_replies": 1,
    "data_weight": 1.0,
    "input_scale": 1.0,
    "delta_scale": 1.0,
    "dropout": 0.0,
    "edition": 1,
    "average": 0.0,
}


def _as_layers(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value  # a lone layer number in YAML


def _as_list(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _without_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("holds a NUL, which no name has")
    return value


def _of_template(value: dict[str, Any]) -> dict[str, Any]:
    try:
        check_template_kwargs(value)
    except UsageError as error:
        raise ValueError(str(error).removeprefix("chat_template_kwargs: ")) from None
    return value


def _with_words(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty")
    return value


Name = Annotated[str, AfterValidator(_without_nul)]  # of a file, a folder, a module


_Scale = Annotated[float, Field(gt=0, lt=1e9)]


class Recipe(BaseModel):
    """Configuration of one run. The defaults are the recipe ``default``: chat template, loss on the reply, batches by length.

    Attributes:
        host: the embedded default, a hub id, a folder or a ``.gguf`` file; null: it was made in Python.
        dtype: of the host: ``auto``, ``float32``, ``bfloat16``, ``float16``. The IRM's weights are always float32.
        device: ``auto``, ``cpu``, ``cuda``, ...; or ``balanced``: the host's layers over all devices (``device_map``).
        threads: CPU threads; null: as many as PyTorch takes. Another number can change the last bits of a sum.
        data: a JSONL file of rows, or ``authored``; null: the rows were given in Python, or there is only an instruction.
        tone: which tone's rows, where the data has several; ``all``: every row, whatever its tone (a conditional IRM).
        seed: of the initial weights, the split and the order of rows.

        instruct: a system prompt to distil into the IRM: the host with it is the teacher; null: rows alone. With rows besides
            only where `data` names a file, or `tone` a tone of the authored ones.
        questions: what the teacher is asked: ``authored``, or a file (a question a line, prompts as JSONL, rows, SQuAD's JSON).
            If there are more than training can pass over twice, the seed chooses that many of them (64 at least).
        teacher_replies: replies that the teacher samples to each question; those in which it obeys are kept.
        data_weight: with an instruction and rows: the weight of a token of the rows beside one of the teacher's replies.

        preset, layers, widths, rank, output_std, input_norm, input_scale, delta_scale, masked, dropout, edition: the
            network; see `IRMShape`.
        layers_path: where the host's decoder layers are, for a host on which the probe cannot tell.

        template: ``chat``: the host's own; ``plain``: question, three spaces, reply (the paper's).
        chat_template_kwargs: variables of the chat template, such as ``{enable_thinking: false}``.
        loss_on: ``reply``: the last one of a conversation; ``assistant``: each of its replies; ``text``: the questions too.
            With a teacher it is always the reply.
        loss_on_thought: on hosts that think, learn the thought before a reply too, and not the reply alone.
        max_length: tokens of a row at most; longer replies are cut.
        validation, test: shares of the rows held out, by group: for the validation loss, and for evaluation after training.
        label_shift: 1: each position predicts the next token. 2: the reference code's mistake (labels shifted twice).
        loss_on_padding: true: rows are padded to `max_length` with the end token, which counts in the loss (the reference
            code's other mistake).
        l1: adds ``l1 / layers * sum |delta|`` to the loss (the paper: 1e-4, off by default), over every token of the batch.

        steps: optimiser steps; null: as many as `epochs` takes; 0: the IRM is saved as it was initialised (a baseline).
        epochs: passes over the training rows; used where `steps` is null, as it is where only `epochs` is given.
        batch_size: rows per step, over all processes.
        accumulate: gradient accumulation: the number of parts in which a step's rows are computed, to save memory.
        optimizer: ``adam`` (AdamW; the same as Adam while `weight_decay` is 0), ``adam-8bit`` (bitsandbytes), ``adafactor``
            (factored second moments: almost no memory), ``sgd``.
        learning_rate: the peak; null: what `rate` gives, 1e-2 or less; ``auto``: found by a search of a few dozen steps.
        schedule: ``linear`` to 0, ``cosine`` to 0, ``constant``, or ``exponential``: times `decay` after each epoch.
        decay: see `schedule`.
        warmup: steps over which the learning rate rises to its peak.
        weight_decay: AdamW's.
        average: fraction of the steps, at the end, over which weights are averaged; 0: the weights of the last step.
        max_grad_norm: norm to which gradients are clipped; 0: no clipping.

        evaluations: how many times at most the validation loss is measured, at equal intervals, besides once before training.
        evaluations_per_epoch: the same per epoch; null: `evaluations` applies.
        patience: evaluations without a better validation loss after which training ends; null: never.
        keep: the final IRM is the ``best`` by validation loss, or the ``last``.
        save_every: steps between checkpoints, besides those at each evaluation; null: only those.
        samples: tokens of each reply to the paper's seven prompts at each evaluation; 0: none.
        report_to: ``tensorboard``, ``wandb``, ``trackio``; Trainer's own callbacks.

        irm_products: dtype of the IRM's matmuls during training: ``bfloat16`` (over twice as fast on
            hardware that has it), ``float32``, or ``auto``: bfloat16 where the host is. Its weights, gradients and optimiser
            are float32 all the same, and so is everything about it in validation and afterwards.
        gradient_checkpointing: recompute the activations inside layers in the backward pass instead of storing them.
        compile: torch.compile the host and the IRM.
        tf32: on NVIDIA GPUs, multiply float32 numbers in TF32 (about 8 times faster; 10 bits of mantissa).

    Example:
        >>> Recipe(steps=10).batch_size
        4
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: Name | None = "smollm2-135m-instruct"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    threads: int | None = Field(default=None, ge=1, le=1024)
    data: Name | None = "authored"
    tone: str | None = None
    seed: int = Field(default=42, ge=0, lt=2**32)

    instruct: Annotated[str, Field(max_length=20_000), AfterValidator(_with_words)] | None = None
    questions: Name = "authored"
    teacher_replies: int = Field(default=1, ge=1, le=64)
    data_weight: float = Field(default=1.0, gt=0, lt=1e6)

    preset: Literal["compact", "paper"] = "compact"
    layers: Annotated[str | list[int], BeforeValidator(_as_layers)] = "all"
    widths: list[int] | None = None
    rank: int | None = Field(default=None, ge=0)
    output_std: float | None = Field(default=None, ge=0, lt=1e3)
    input_norm: bool | None = None
    input_scale: _Scale | None = None
    delta_scale: _Scale | list[_Scale] | None = None
    masked: list[Annotated[int, Field(ge=0)]] | None = None
    dropout: float | None = Field(default=None, ge=0, lt=1)
    edition: Literal[1, 2] | None = None
    layers_path: str | None = None

    template: Literal["chat", "plain"] = "chat"
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_of_template)] = {}
    loss_on: Literal["reply", "assistant", "text"] = "reply"
    loss_on_thought: bool = False
    max_length: int = Field(default=256, ge=8, le=10**7)
    validation: float = Field(default=0.1, gt=0, lt=1)
    test: float = Field(default=0.0, ge=0, lt=1)
    label_shift: Literal[1, 2] = 1
    loss_on_padding: bool = False
    l1: float = Field(default=0.0, ge=0, lt=1e9)

    steps: int | None = Field(default=220, ge=0, le=10**9)
    epochs: float | None = Field(default=None, gt=0, le=1e6)
    batch_size: int = Field(default=4, ge=1, le=10**6)
    accumulate: int = Field(default=1, ge=1)
    optimizer: Literal["adam", "adam-8bit", "adafactor", "sgd"] = "adam"
    learning_rate: Annotated[float, Field(gt=0, lt=1000)] | Literal["auto"] | None = None
    schedule: Literal["linear", "cosine", "constant", "exponential"] = "linear"
    decay: float = Field(default=0.85, gt=0, le=1)
    warmup: int = Field(default=5, ge=0, le=10**9)
    weight_decay: float = Field(default=0.0, ge=0, lt=1e9)
    average: float = Field(default=0.0, ge=0, le=1)
    max_grad_norm: float = Field(default=1.0, ge=0, lt=math.inf)

    evaluations: int = Field(default=3, ge=1, le=10**9)
    evaluations_per_epoch: int | None = Field(default=None, ge=1, le=10**9)
    patience: int | None = Field(default=None, ge=1, le=10**9)
    keep: Literal["best", "last"] = "best"
    save_every: int | None = Field(default=None, ge=1, le=10**9)
    samples: int = Field(default=40, ge=0, le=10**6)
    report_to: Annotated[list[Literal["tensorboard", "wandb", "trackio"]], BeforeValidator(_as_list)] = ["tensorboard"]

    irm_products: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    tf32: bool = True

    @model_validator(mode="before")
    @classmethod
    def _epochs_alone(cls, values: Any) -> Any:
        """Whoever gives epochs and no steps does not mean the default steps."""
        alone = isinstance(values, dict) and values.get("epochs") is not None and "steps" not in values
        return values | {"steps": None} if alone else values

    @model_validator(mode="after")
    def _together(self) -> Recipe:
        if self.steps is None and self.epochs is None:
            raise ValueError("give steps or epochs; both are null")
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together leave no rows to train on")
        if self.instruct is not None and (self.label_shift != 1 or self.loss_on_padding):
            raise ValueError("label_shift and loss_on_padding are for rows alone; leave them out (instruct)")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} cannot be divided into {self.accumulate} equal parts (accumulate)")
        return self

    @property
    def shape(self) -> IRMShape:
        """The network that it asks for."""
        from realigner.irm import IRMShape

        values = self.model_dump() | self.by_preset
        return IRMShape(**{field.name: values[field.name] for field in fields(IRMShape)})

    @property
    def by_preset(self) -> dict[str, Any]:
        """`edition`, `dropout` and scales: the preset's where they are null.

        Scales that are still null are to be measured on the host.

        Example:
            >>> Recipe().by_preset["dropout"], Recipe(preset="paper").by_preset["dropout"]
            (0.6, 0.0)
        """
        is_paper = self.preset == "paper"
        edition = 1 if is_paper else self.edition or _NEWEST
        dropout = 0.0 if edition == 1 else _DROPOUT
        scales = {key: 1.0 if is_paper and getattr(self, key) is None else getattr(self, key) for key in SCALES}
        return {
            "edition": edition,
            "dropout": dropout if self.dropout is None else self.dropout,
            **scales,
        }

    @property
    def has_rows(self) -> bool:
        """Whether it names rows; with an instruction it need not."""
        return (
            self.instruct is None or self.data not in (None, "authored") or (self.data == "authored" and self.tone is not None)
        )

    @property
    def peak_rate(self) -> float:
        """`learning_rate`, of a recipe in which it is settled (`training_run.resolve`)."""
        if not isinstance(self.learning_rate, float):
            raise UsageError(f"learning_rate: {self.learning_rate!r} is not settled yet; give a number")
        return self.learning_rate

    def rate(self, hidden_size: int) -> float:
        """The learning rate on a host of this residual width, where none is given.

        What a step of Adam adds to a sum over a layer's inputs grows with their number (Yang et al. 2022, arXiv 2203.03466), so
        the compact preset's `DEFAULT_RATE` is multiplied by the least of 1, 576 / the host's width and 256 / the IRM's largest
        width. An instruction takes 0.3 of that.
        """
        if self.preset == "paper":
            return PAPER_RATE
        widths, rank = self.shape.resolved_widths(hidden_size)
        most = DEFAULT_RATE * (1.0 if self.instruct is None else _OF_DEFAULT)
        return most * min(1.0, _HOST_WIDTH / hidden_size, _IRM_WIDTH / max(*widths, rank))

    def changed(self, **values: Any) -> Recipe:
        """Another recipe with these values; ``epochs`` without ``steps`` makes `steps` null.

        Raises:
            UsageError: naming the key.

        Example:
            >>> Recipe().changed(epochs=3).steps is None
            True
        """
        return self._changed(values, "recipe")

    def _changed(self, values: Mapping[str, Any], where: str) -> Recipe:
        return _recipe(self.values_with(values), where, UsageError)

    @property
    def thinking_budget(self) -> int:
        """Tokens of a thought at most when a host that thinks replies: 512 with `loss_on_thought`, else 0."""
        return 512 if self.loss_on_thought else 0

    def values_with(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Its keys with those given laid over them, not validated yet; its steps are left out where epochs are given."""
        kept = self.model_dump()
        if given.get("epochs") is not None:
            del kept["steps"]
        return {**kept, **given}

    def difference(self, other: Recipe) -> str | None:
        """The first key by which the two recipes are different runs, with both values; None if they are the same run."""
        own, others = self.model_dump() | self.by_preset, other.model_dump() | other.by_preset
        for key, mine in own.items():
            theirs = others[key]
            if key not in RUNTIME_ONLY_KEYS and mine != theirs:
                mine, theirs = ("null" if value is None else value for value in (mine, theirs))
                return f"{key} is {mine}, not {theirs}"
        return None


def make_recipe(base: str | Path = "default", **values: Any) -> Recipe:
    """A built-in recipe or a YAML file's, with some values changed.

    Raises:
        UsageError: naming the key.
        RealignerError: for a file that is not a recipe, naming the line.

    Example:
        >>> make_recipe("paper", steps=30).batch_size
        8
    """
    return read_recipe(base).changed(**values)


def read_recipe(name: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """A recipe by name or file, with ``key=value`` settings (values as in YAML) laid over it.

    Raises:
        RealignerError: naming the file, the line and the key of the first thing that is wrong.
        UsageError: for an invalid setting or unknown name.
    """
    text, where = recipe_text(name)
    values, lines = read_yaml(text, where)
    if len(values.keys() & Recipe.model_fields.keys()) >= _WRITTEN_OUT:
        values = LATER_KEYS | values
    recipe = _recipe(values, where, RealignerError, lines)
    given = dict(map(parse_setting, settings))
    return recipe._changed(given, "settings") if given else recipe


def recipe_text(name: str | Path) -> tuple[str, str]:
    """The YAML of a recipe by name or file, and what to call it in messages."""
    if str(name) in BUILT_IN:
        return (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"), f"recipe {name}"
    path = Path(name)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        path = path / "recipe.yaml"
    if not path.is_file():
        raise UsageError(f"recipe {name}: neither a file nor one of {', '.join(BUILT_IN)}")
    return decoded(read_bytes(path, MOST_YAML), path), str(path)


def parse_setting(setting: str) -> tuple[str, Any]:
    """``key=value`` as a key and a YAML value.

    Example:
        >>> parse_setting("layers=[0, 5]")
        ('layers', [0, 5])
    """
    key, equals, value = setting.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"setting {setting!r}: write key=value, for example steps=100")
    try:
        return key.strip(), _plain_yaml(value)[1]
    except yaml.YAMLError as error:
        why = f" ({error.problem})" if isinstance(error, _RefusedError) else ""
        raise UsageError(f"setting {setting!r}: {value!r} is not a YAML value{why}") from None
    except _UNREADABLE as error:
        raise UsageError(f"setting {setting!r}: not YAML that can be read ({error})") from None


class _RefusedError(yaml.MarkedYAMLError):
    """YAML that may mean endless work."""


class _PlainLoader(yaml.SafeLoader):
    """Each key once, values written out: aliases multiply what a file holds, numbers of thousands of digits take hours."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise _RefusedError(problem=f"the alias *{event.anchor}: write the value out", problem_mark=event.start_mark)
        node: Any = super().compose_node(parent, index)
        is_number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if is_number and len(node.value) > _DIGITS:
            problem = f"a number of {len(node.value):,} characters; {_DIGITS} at most"
            raise _RefusedError(problem=problem, problem_mark=node.start_mark)
        if isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, _ in node.value:
                if key.value in lines:
                    problem = f"duplicate key {key.value!r}, first on line {lines[key.value]}"
                    raise _RefusedError(problem=problem, problem_mark=key.start_mark)
                lines[str(key.value)] = key.start_mark.line + 1
        return node


def read_yaml(text: str, where: str) -> tuple[dict[str, Any], dict[str, int]]:
    """A YAML mapping and the line of each key; a key of a mapping in it is named ``outer.inner``.

    Raises:
        RealignerError: naming the line, for what is not YAML, not a mapping, names a key twice, or has aliases; for more than
            256 KiB.
    """
    if len(text) > MOST_YAML:
        raise RealignerError(f"{where}: larger than the {MOST_YAML >> 10} KiB that are read of such a file")
    try:
        node, values = _plain_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        what = "not read" if isinstance(error, _RefusedError) else "not valid YAML"
        raise RealignerError(f"{where}{line}: {what} ({getattr(error, 'problem', None) or 'unreadable'})") from None
    except _UNREADABLE as error:
        raise RealignerError(f"{where}: not YAML that can be read ({' '.join(str(error).split())})") from None
    if node is None:
        return {}, {}
    if not isinstance(node, yaml.MappingNode) or not isinstance(values, dict):
        raise RealignerError(f"{where}: is not a list of 'key: value' lines")
    lines: dict[str, int] = {}
    for key, value in node.value:
        name = str(key.value)
        lines[name] = key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            lines |= {f"{name}.{inner.value}": inner.start_mark.line + 1 for inner, _ in value.value}
    return {str(key): value for key, value in values.items()}, lines


def _plain_yaml(text: str) -> tuple[Any, Any]:
    """The node of a YAML document, and its value."""
    loader = _PlainLoader(text)
    try:
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, every key written out, in the order of the class."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, default_flow_style=None, allow_unicode=True)


def _recipe(
    values: Mapping[str, Any], where: str, kind: type[RealignerError], lines: Mapping[str, int] | None = None
) -> Recipe:
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        place = f"{where}:{lines[key]}" if lines and key in lines else where
        if first["type"] == "extra_forbidden":
            close = difflib.get_close_matches(key, Recipe.model_fields, n=1)
            meant = f"; did you mean {close[0]!r}?" if close else "; see realigner recipes default"
            raise kind(f"{place}: unknown key {key!r}{meant}") from None
        message = first["msg"].removeprefix("Value error, ")
        what = f"{key}: {first['input']!r}: {message[:1].lower()}{message[1:]}" if key else message
        raise kind(f"{place}: {what}") from None
