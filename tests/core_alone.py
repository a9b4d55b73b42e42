"""Run by test_wheel.py in an environment that holds the built wheel and its core dependencies, and nothing else.

Attach, generate at three strengths, stream, save, load; and what needs an extra says which, in one line.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer

import realigner as ra
from realigner.extras import FOLDERS
from realigner.tiny import tiny_host

NEEDED = {"train": "train", "record": "study", "analysis": "study", "build_report": "study", "import_reference": "study"}
COMMANDS = {
    "train": ("train", "--out", "run"),
    "sweep": ("sweep", "paper", "--out", "runs", "--on", "here"),
    "study": ("analyze", "a.zarr"),
    "serve": ("serve", "smollm2-135m-instruct"),
    "app": ("app", "--irm", "anger"),
    "data": ("data", "build", "--squad", "squad.json", "--tone", "anger"),
}


def distributions(start: str) -> set[str]:
    """What `start` needs to be installed, itself included; its extras left out."""
    found, waiting = set(), [start]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            needed = distribution(name).requires or []
        except PackageNotFoundError:  # of another system or Python
            continue
        found.add(name)
        waiting += [re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in needed if "extra ==" not in line]
    return found


def check_dependencies() -> None:
    declared = requires("realigner") or []
    direct = [line for line in declared if "extra ==" not in line]
    assert 0 < len(direct) <= 10, direct
    core = distributions("realigner")
    for line in declared:
        name = re.split(r"[^\w.-]", line)[0].lower()
        if "extra ==" in line and name not in core:
            try:
                distribution(name)
            except PackageNotFoundError:
                continue
            raise AssertionError(f"{name} is of an extra and is installed: the environment is not bare")
    print(f"{len(direct)} direct dependencies, {len(core) - 1} in all")


def small_pair() -> tuple[Any, Any]:
    """A tiny host and a tokenizer of its 101 words."""
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(101)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return tiny_host("llama"), PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")


def check_model(folder: Path) -> None:
    host, tokenizer = small_pair()
    inputs = tokenizer("w5 w17 w33", return_tensors="pt", return_token_type_ids=False)
    options: dict[str, Any] = {**inputs, "max_new_tokens": 12, "do_sample": False}
    bare = host.generate(**options)
    torch.manual_seed(0)
    model = get_peft_model(host, ra.IRMConfig(preset="compact", output_std=0.02, input_scale=1.0, delta_scale=1.0))
    assert isinstance(model, PeftModel)

    def tokens(irm: Any, strength: float) -> list[int]:
        with ra.strength(irm, strength):
            return list(irm.generate(**options)[0].tolist())

    replies = {strength: tokens(model, strength) for strength in (0.0, 0.5, 1.0)}
    assert replies[0.0] == bare[0].tolist()
    assert len({tuple(reply) for reply in replies.values()}) == 3, replies

    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    with ra.strength(model, 0.5):
        thread = Thread(target=model.generate, kwargs={**options, "streamer": streamer})
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text == tokenizer.decode(replies[0.5]), text

    model.save_pretrained(str(folder))
    loaded = PeftModel.from_pretrained(small_pair()[0], str(folder))
    assert {strength: tokens(loaded, strength) for strength in replies} == replies
    assert tokens(ra.load_irm(small_pair()[0], folder), 1.0) == replies[1.0]

    on_disk = folder.with_name("host")
    for part in small_pair():
        part.save_pretrained(on_disk)
    runtime = ra.load(folder, host=on_disk, dtype="float32", device="cpu")
    assert "".join(runtime.stream("w5 w17", max_new_tokens=12)) == runtime.answer("w5 w17", max_new_tokens=12) != ""
    done = realigner(folder.parent, "generate", "--irm", "irm", "--host", "host", "--max-new-tokens", "12", "w5 w17")
    assert "realigned: w" in done.stdout, done


def check_extras(folder: Path) -> None:
    laboratory = {f"realigner.{name}" for name in FOLDERS}
    assert not laboratory & set(sys.modules), laboratory & set(sys.modules)
    for name, extra in NEEDED.items():
        raised: list[Exception] = []
        try:
            getattr(ra, name)
        except ImportError as error:
            raised.append(error)
        asked = rf'realigner\.{name} needs packages .* \(.+\); install them: pip install "realigner\[{extra}\]"'
        assert isinstance(raised[0], ra.RealignerError)
        assert re.fullmatch(asked, str(raised[0])), str(raised[0])
    (folder / "a.zarr").mkdir()
    for extra, words in COMMANDS.items():
        done = realigner(folder, *words)
        asked = rf'realigner: {words[0]} needs packages .* \(.+\); install them: pip install "realigner\[{extra}\]"\n'
        assert done.returncode == 1, done
        assert re.fullmatch(asked, done.stderr), done.stderr
    assert "generate" in realigner(folder, "--help").stdout
    assert "peft" in realigner(folder, "doctor").stdout
    assert realigner(folder, "hosts", "--type", "gpt2").returncode == 0


def realigner(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("realigner")), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


if __name__ == "__main__":
    check_dependencies()
    with tempfile.TemporaryDirectory() as place:
        check_model(Path(place) / "irm")
        check_extras(Path(place))
    print("the core works alone")
