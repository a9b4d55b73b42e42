"""What is wrong with a value that a pydantic model refused, as one line for its author."""

from __future__ import annotations

from pydantic import BaseModel, ValidationError

_WHAT = {
    "missing": "is missing",
    "string_too_short": "is empty",
    "too_short": "is empty",
    "string_type": "is not a string",
    "tuple_type": "is not a list",
    "dict_type": "is not a table",
    "string_pattern_mismatch": "is not in the form it must have",
}


def first_fault(error: ValidationError, model: type[BaseModel], name: str) -> str:
    """The first fault: the key and what is wrong with it.

    Args:
        error: what validation raised.
        model: which model it was of; its keys are listed when one is unknown.
        name: what the model describes, with its article: ``a row``.
    """
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {name} has {', '.join(model.model_fields)}"
    fault = _WHAT.get(first["type"], first["msg"].removeprefix("Value error, "))
    return f"key {key!r} {fault}" if key else fault
