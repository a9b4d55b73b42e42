"""For the reference: our docstrings say ``Example:``, and griffe knows ``Examples:``, which it shows as code."""

from __future__ import annotations

import re
from typing import Any

import griffe


class ExamplesSection(griffe.Extension):
    """Renames the section while the package is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
