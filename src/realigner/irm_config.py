"""An IRM's config as PEFT keeps it, and the two files of a saved adapter.

Loading is strict: a missing, pickled or truncated weights file, an unknown key, a value of another type, and tensors that are
not floating-point are each refused with a one-line error, before anything is attached or allocated.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

from realigner.adapter_files import (
    CONFIG_FILE as CONFIG_FILE,
    FILE_PREFIX as FILE_PREFIX,
    PEFT_NAME as PEFT_NAME,
    TYPES,
    WEIGHTS_FILE as WEIGHTS_FILE,
    adapter_folder as adapter_folder,
    check_types,
    file_tensors as file_tensors,
    read_values,
)
from realigner.chat_format import TEMPLATES, check_template_kwargs
from realigner.errors import RealignerError, UsageError
from realigner.fingerprints import Fingerprint
from realigner.hosts import folder_of
from realigner.irm import EDITIONS, IRMShape
from realigner.settings import check_strength

_HOW_TO_LOAD = """

## How to load

PEFT knows injectable realignment models once realigner is imported (`pip install realigner`):

```python
import realigner
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")
```
"""


def _register_peft_type() -> PeftType:
    # PEFT admits only the methods of its own enum; this adds ours as a member like any other.
    name = PEFT_NAME.upper()
    if name not in PeftType._member_map_:
        member = str.__new__(PeftType, name)
        member._name_ = name
        member._value_ = name
        PeftType._member_map_[name] = member
        PeftType._member_names_.append(name)
        PeftType._value2member_map_[name] = member
        type.__setattr__(PeftType, name, member)
    return PeftType(name)


_PEFT_TYPE = _register_peft_type()


@dataclass
class IRMConfig(PeftConfig, IRMShape):
    """Everything about an IRM but its weights: the network's shape, the host it is for, and where it is injected.

    Give `preset`, `layers` and, if wanted, `widths`, `rank`, `output_std` (see `IRMShape`). The rest, the scales too, is filled
    in when the IRM is attached to a host, and saved with it.

    Attributes:
        layers_path: where the host's decoder layers are, for a host on which the probe cannot tell.
        tone: the tone it was trained for, if any.
        template: the prompt format: ``"chat"``, the host's chat template, or ``"plain"``, the paper's format.
        chat_template_kwargs: variables of the chat template that it was trained with, such as ``{"enable_thinking": False}``.
        strength: the recommended strength (1: as trained); `runtime.load` applies it, while an IRM attached by PEFT acts at 1.
        strength_range: ``[low, high]``, where it was found to do about as well (`realigner evaluate --tune strength`).
        host: the fingerprint of the host it belongs to (`fingerprints.Fingerprint`).
        site: what the probe found on that host (`sites.HostSites.summary`).
        modules_to_save: as in PEFT, names of host modules (such as a head) of which a copy is trained and saved with the IRM.

    Raises:
        UsageError: naming the field, for a bad value.

    Example:
        >>> IRMConfig(preset="compact", layers="0-3").rank is None
        True
    """

    layers_path: str | None = None
    tone: str | None = None
    template: str = "chat"
    chat_template_kwargs: dict[str, Any] | None = None
    strength: float = 1.0
    strength_range: list[float] | None = None
    host: dict[str, Any] | None = None
    site: dict[str, Any] | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        check_types({key: getattr(self, key) for key in TYPES})
        if not all(isinstance(name, str) for name in self.modules_to_save or ()):
            raise UsageError(f"modules_to_save: {reprlib.repr(self.modules_to_save)} is not a list of modules' names")
        self.task_type: Any = self.task_type or "CAUSAL_LM"
        super().__post_init__()
        self.peft_type = _PEFT_TYPE
        self.file_tensors: dict[str, list[int]] | None = None  # tensor -> shape of the file that it came with, until loaded
        if self.base_model_name_or_path:
            self.base_model_name_or_path: str | None = folder_of(self.base_model_name_or_path)
        self.validate()
        if self.template not in TEMPLATES:
            raise UsageError(f"template: {self.template!r} is not one of {', '.join(TEMPLATES)}")
        check_template_kwargs(self.chat_template_kwargs)
        if check_strength(self.strength).dim():
            raise UsageError(f"strength: {self.strength!r} is not a number")
        if (bounds := self.strength_range) is not None:
            numbers = [value for value in bounds if isinstance(value, (int, float)) and not isinstance(value, bool)]
            if not len(bounds) == len(numbers) == 2 or not bounds[0] <= self.strength <= bounds[1]:
                found = f"strength_range: {reprlib.repr(bounds)}"
                raise UsageError(f"{found} is not [low, high] with the strength, {self.strength:g}, between them")
            self.strength_range = list(bounds)

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON values; a converted host goes by its name, not by this machine's cache folder."""
        values: dict[str, Any] = super().to_dict()
        if self.host and self.host.get("name"):
            values["base_model_name_or_path"] = self.host["name"]
        return values

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the config, and add to PEFT's model card how to load the IRM: realigner must be imported first."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory, "README.md")
        if card.is_file() and "import realigner" not in (text := card.read_text(encoding="utf-8")):
            card.write_text(text.rstrip() + _HOW_TO_LOAD, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> IRMConfig:
        """Read an adapter's config, in a local folder or on the hub; the weights file is checked too, before anything is built.

        Raises:
            RealignerError: naming the file and what is wrong with it.
        """
        name = str(pretrained_model_name_or_path)
        folder = Path(name, subfolder or "")
        if not folder.is_dir():
            from huggingface_hub import hf_hub_download

            options = cls._split_kwargs(kwargs)[0]
            try:
                files = [hf_hub_download(name, file, subfolder=subfolder, **options) for file in (CONFIG_FILE, WEIGHTS_FILE)]
            except (OSError, ValueError) as error:
                why = " ".join(str(error).split())[:200]
                raise RealignerError(f"{name}: no IRM found here or on the hub [{why}]") from None
            folder = Path(files[0]).parent
        check_adapter(folder)
        config = super().from_pretrained(str(folder), **kwargs)
        assert isinstance(config, IRMConfig)
        config.edition = config.edition or EDITIONS[0]  # which earlier files do not name
        config.file_tensors = file_tensors(adapter_folder(folder))
        return config


def check_adapter(folder: str | Path) -> dict[str, Any]:
    """Check an adapter's two files without a host and return its config's values.

    Raises:
        RealignerError: when a file is missing, truncated, pickled, or not an IRM's.
    """
    folder = adapter_folder(folder)
    path = folder / CONFIG_FILE
    values = read_values(folder)
    try:
        IRMConfig(**values)
        if values.get("host") is not None:
            Fingerprint.from_dict(values["host"])
    except (RealignerError, ValueError) as error:  # ValueError: PEFT's own
        raise RealignerError(f"{path}: {error}") from None
    file_tensors(folder)
    return values


# Whoever has a config may give it to PEFT, which must know the tuner by then. (The tuner imports this file, now whole.)
import_module("realigner.tuner")
