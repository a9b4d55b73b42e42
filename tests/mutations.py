"""Files made wrong: hypothesis draws one thing to change, in the text's structure, in its bytes, or in the file itself."""

from __future__ import annotations

import codecs
import io
import json
import os
import shutil
import struct
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

_NAMED_BY_OTHERS = ("run", "rows.jsonl", "recipe.yaml")
_HERE = "@@here@@"
_DEEP = 20_000
_DIGITS = "9" * 5000
# Values as they are written in JSON, and nearly all of them in YAML and TOML too.
_VALUES = (
    "null", "true", "false", "0", "-1", "1", "2", "0.5", "-0.0", "1e308", "1e999", "-5", "99", "4294967296",
    "9223372036854775807", "9223372036854775808", "1000000000000", "NaN", "Infinity", "-Infinity", _DIGITS, "-" + _DIGITS,
    f"1.{_DIGITS}", f"1e{_DIGITS}", '""', '" "', '"x"', '"0"', '"1"', '"nan"', '"NaN"', '"null"', '"true"', '"all"', '"auto"',
    '"\\u0000"', '"\\ud800"', '"\\udfff\\ud800"', '"\\u001b[31mred\\u001b[0m"', '"\\n\\r\\t"',
    '"\\u202e"', '"\u00e9\U0001f600"',
    '"../../../etc/passwd"', '"/dev/null"', '"/"', '"~"', '"."', f'"{"x" * 1_000_000}"', f'"{"a/" * 3000}"', '"{{ 1/0 }}"',
    '"{{"', '"{answer}"', '"{"', '"%s"', '"http://127.0.0.1:1/"',
    "[]", "[[]]", "[null]", "[1]", "[-1]", '["x"]', "[1, 2, 3]", "[[1, 2], [3]]", '[{"a": 1}]', "[NaN]", "[true, false]",
    f"[{'1, ' * 100_000}1]", "{}", '{"a": {}}', '{"": ""}', '{"a": 1, "a": 2}', '{"0": 1}',
    "[" * _DEEP + "]" * _DEEP, '{"a":' * _DEEP + "1" + "}" * _DEEP, "[" * 60 + "]" * 60,
)  # fmt: skip
_YAML = (
    "!!python/object/apply:os.system [true]", "&a [*a]", "*nothing", "2026-01-01", "0x1F", "~", ".nan", ".inf", "!!binary aGk=",
    "1_000", "190:20:30", "!!set {a, b}", "!!float x", "!!timestamp x", "- 1", "? x", "|\n  text", "!!int 0b", "<<: 1", "[",
    "'",
)  # fmt: skip
_TOML = (
    "2026-01-01", "07:32:00", "1_000", "inf", "nan", "0x1F", '"""\ntext"""', "{a.b = 1}", "[", "'", "0b1",
    "1979-05-27T07:32:00Z",
)  # fmt: skip
_INSERTED = (
    b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x1b[31m", b"\n", b"\r", b'"', b"{", b"}", b"[", b",", b"\\", b"\xef\xbb\xbf",
    b"\x85", b"\xe2\x80\xa8", b"\t", b"'", b"#", b"\x1a", b"9" * 5000, b"[" * _DEEP, b"x" * 200_000,
)  # fmt: skip
_TEXT = (".json", ".jsonl", ".journal", ".yaml", ".toml", ".csv", ".jinja", ".txt")
BIG = 3 << 30  # bytes of a sparse file


def mutate(draw: Any, path: Path, structured: bool = True) -> str:
    """Change one file; returns what was done, in words."""
    ways = ["bytes", "file", "encoding"] if path.suffix in _TEXT else ["bytes", "bytes", "file"]
    if structured and path.suffix in (".json", ".jsonl", ".journal", ".yaml", ".toml", ".safetensors", ".skops"):
        ways = ["structure"] * (2 * len(ways)) + ways
    way: str = draw(st.sampled_from(ways))
    if way == "file":
        return f"{path}: {_as_file(draw, path)}"
    data = path.read_bytes()
    if way == "encoding":
        what, data = _encoded(draw, data)
    elif way == "bytes":
        what, data = _bytes(draw, data)
    else:
        what, data = {
            ".jsonl": _lines,
            ".journal": _lines, ".safetensors": _safetensors, ".skops": _zip, ".toml": _toml, ".yaml": _yaml
        }.get(path.suffix, _json)(draw, data)  # fmt: skip
    path.write_bytes(data)
    return f"{path}: {what}"


def _as_file(draw: Any, path: Path) -> str:
    kind: str = draw(
        st.sampled_from(["missing", "empty", "blank", "folder", "loop", "dangling", "unreadable", "sparse", "zeros"])
    )
    size = path.stat().st_size
    if kind == "unreadable":
        path.chmod(0)
        return kind
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind != "missing":
        path.write_bytes({"blank": b" \n\n", "zeros": bytes(size)}.get(kind, b""))
    if kind == "sparse":
        os.truncate(path, BIG)
    return kind


def _encoded(draw: Any, data: bytes) -> tuple[str, bytes]:
    text = data.decode()
    name: str = draw(st.sampled_from(["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "crlf", "cr", "two boms"]))
    if name == "crlf":
        return name, data.replace(b"\n", b"\r\n")
    if name == "cr":
        return name, data.replace(b"\n", b"\r")
    if name == "two boms":
        return name, codecs.BOM_UTF8 * 2 + data
    return name, (text + "\u00e9" * (name == "latin-1")).encode(name, "replace")


def _bytes(draw: Any, data: bytes) -> tuple[str, bytes]:
    at, other = (draw(st.integers(0, max(0, len(data) - 1))) for _ in range(2))
    kind = draw(st.sampled_from(["flip", "set", "cut", "insert", "drop", "repeat", "swap"]))
    low, high = min(at, other), max(at, other)
    if kind == "flip" and data:
        bit = draw(st.integers(0, 7))
        return f"bit {bit} of byte {at} flipped", data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
    if kind == "set" and data:
        value = draw(st.sampled_from([0, 10, 27, 34, 127, 128, 255]))
        return f"byte {at} set to {value}", data[:at] + bytes([value]) + data[at + 1 :]
    if kind == "cut":
        return f"cut at byte {at}", data[:at]
    if kind == "drop":
        return f"bytes {low} to {high} dropped", data[:low] + data[high:]
    if kind == "repeat":
        return f"bytes {low} to {high} repeated", data[:high] + data[low:high] + data[high:]
    if kind == "swap":
        return f"bytes from {low} and from {high} swapped", data[:low] + data[high:] + data[low:high]
    added = draw(st.sampled_from(_INSERTED))
    return f"{added[:12]!r} ({len(added)} bytes) inserted at byte {at}", data[:at] + added + data[at:]


def _json(draw: Any, data: bytes) -> tuple[str, bytes]:
    what, text = _changed(draw, json.loads(data), _VALUES, _json_text)
    return what, text.encode("utf-8", "surrogatepass")


def _yaml(draw: Any, data: bytes) -> tuple[str, bytes]:
    def written(value: Any) -> str:
        return "".join(f"{key}: {_json_text(item)}\n" for key, item in value.items())

    what, text = _changed(draw, yaml.safe_load(data), (*_VALUES, *_YAML * 2), written)
    return what, text.encode("utf-8", "surrogatepass")


def _toml(draw: Any, data: bytes) -> tuple[str, bytes]:
    def inline(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(key)} = {inline(item)}" for key, item in value.items()) + "}"
        return "[" + ", ".join(map(inline, value)) + "]" if isinstance(value, list) else _json_text(value)

    def written(value: Any) -> str:
        return "".join(f"{json.dumps(key)} = {inline(item)}\n" for key, item in value.items())

    what, text = _changed(draw, tomllib.loads(data.decode()), (*_VALUES, *_TOML * 3), written)
    return what, text.encode("utf-8", "surrogatepass")


def _lines(draw: Any, data: bytes) -> tuple[str, bytes]:
    lines = data.splitlines()
    at, other = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
    kind = draw(st.sampled_from(["change", "change", "change", "repeat", "drop", "join", "swap"]))
    what = f"line {at + 1}: {kind}"
    if kind == "change":
        inner, lines[at] = _json(draw, lines[at])
        what = f"line {at + 1}: {inner}"
    elif kind == "repeat":
        lines.insert(other, lines[at])
    elif kind == "drop":
        del lines[at]
    elif kind == "join" and at + 1 < len(lines):
        lines[at : at + 2] = [lines[at] + lines[at + 1]]
    else:
        lines[at], lines[other] = lines[other], lines[at]
    return what, b"\n".join(lines) + b"\n"


def _safetensors(draw: Any, data: bytes) -> tuple[str, bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + size], data[8 + size :]
    if draw(st.integers(0, 5)) == 0:
        word = draw(st.sampled_from([0, 1, size - 1, size + 1, size + 8, len(data), 2**31, 2**40, 2**63, 2**64 - 1]))
        return f"length word {word}", struct.pack("<Q", word) + data[8:]
    if draw(st.integers(0, 3)) == 0:  # another dtype or shape that may fit all the same
        values = json.loads(header)
        name = draw(st.sampled_from([name for name in values if name != "__metadata__"]))
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        number = st.sampled_from([-1, 0, 1, 2, 3, 32, 64, 1000, 2**31, 2**62, 2**64])
        values[name][key] = (
            draw(st.sampled_from(["F32", "F16", "BF16", "F64", "I32", "I64", "U8", "BOOL", "F8_E4M3", "C64", "X"]))
            if key == "dtype"
            else draw(st.lists(number, max_size=4))
        )
        what, changed = f"{name}: {key} {values[name][key]}", json.dumps(values).encode()
    else:
        what, changed = _json(draw, header)
    return what, struct.pack("<Q", len(changed)) + changed + body


def _zip(draw: Any, data: bytes) -> tuple[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = draw(st.sampled_from(sorted(members) + ["schema.json"] * len(members)))
    what, members[name] = (_json if name.endswith(".json") else _bytes)(draw, members[name])
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return f"{name}: {what}", stream.getvalue()


def _changed(draw: Any, tree: Any, values: tuple[str, ...], written: Any) -> tuple[str, str]:
    """One place of a nest of dicts and lists changed, as text."""
    place = _place(draw, tree)
    kind = draw(st.sampled_from(["value", "value", "value", "value", "drop", "twice", "rename", "wrap", "another's"]))
    if not place:
        kind = "value"
    raw = draw(st.sampled_from(values))
    parent = tree
    for step in place[:-1]:
        parent = parent[step]
    shown = ".".join(map(str, place)) or "the whole"
    if kind == "drop":
        del parent[place[-1]]
        return f"{shown} dropped", written(tree)
    if kind == "rename" and isinstance(parent, dict):
        parent[draw(st.sampled_from(["", "x", "\0", "\x1b[31m", "0", "__class__", "a" * 10_000]))] = parent.pop(place[-1])
        return f"{shown} renamed", written(tree)
    if kind == "another's":
        raw = _json_text(draw(st.sampled_from([_at(tree, other) for other in _places(tree)])))
    elif kind == "wrap":
        raw = draw(st.sampled_from(["[{}]", '{{"a": {}}}'])).format(_json_text(parent[place[-1]]))
    elif kind == "twice" and isinstance(parent, dict):
        raw = f"{_json_text(parent[place[-1]])}, {json.dumps(place[-1])}: {raw}"
    if not place:
        return f"the whole = {raw[:40]}", raw
    parent[place[-1]] = _HERE
    return f"{shown} = {raw[:40]} ({kind})", written(tree).replace(json.dumps(_HERE), raw)


def _place(draw: Any, tree: Any) -> tuple[Any, ...]:
    """A place of a nest; one far up is as likely as the many far down together."""
    place: tuple[Any, ...] = ()
    while tree and isinstance(tree, dict | list) and draw(st.integers(0, 3)):
        step = draw(st.sampled_from(list(tree) if isinstance(tree, dict) else range(len(tree))))
        place, tree = (*place, step), tree[step]
    return place


def _places(tree: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield above
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from _places(value, (*above, key))


def _at(tree: Any, place: tuple[Any, ...]) -> Any:
    for step in place:
        tree = tree[step]
    return tree


def _json_text(value: Any) -> str:
    return json.dumps(value, default=str)


def fresh(valid: Path, case: Path, wanted: str) -> None:
    """Copies of valid artefacts in place of the last ones: those that a command names, and the small ones that others name."""
    if case.exists():
        for path in (case, *case.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o777 if path.is_dir() else 0o666)
        shutil.rmtree(case)
    case.mkdir()
    for path in valid.iterdir():
        if path.name in wanted or path.name in _NAMED_BY_OTHERS:
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, case / path.name)
