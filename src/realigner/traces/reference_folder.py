"""The CSV folders that the paper's reference code logs: ``EXPERIMENT/Prompt1_CSVs/index_value_layer_1.csv``, one file a token.

Each file has the columns ``index, layer, value`` and a row for every layer and neuron. The code that wrote them splits a prompt
into its tokens, and then writes the last of them a second time; that second file tells where the prompt ended, and is left out.
What was asked and which tokens they were is not in the files.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from realigner.console import progress
from realigner.errors import RealignerError
from realigner.files import read_bytes
from realigner.traces.layout import TOP, RunLabel, join, text_dataset
from realigner.traces.summary import summarise

_PROMPT = re.compile(r"Prompt(\d+)_CSVs")
_TOKEN = re.compile(r"index_value_layer_(\d+)\.csv")
_FILE_MOST = 1 << 28  # bytes: a token's file has some megabytes
_COLUMNS = ("index", "layer", "value")


def import_reference(
    folder: str | Path, run: str | None = None, tone: str = "", seed: int = 0, top: int = TOP, quiet: bool = True
) -> xr.Dataset:
    """Read an experiment's folder as a trace, every delta kept.

    Args:
        folder: it holds ``Prompt1_CSVs``, ``Prompt2_CSVs``, ...
        run: the run's name; by default the folder's.
        tone, seed: its labels.
        top: how many of a text's largest values to keep.
        quiet: show no progress.

    Raises:
        RealignerError: naming the folder or file, and the row where there is one, that is not what it should be.

    Example:
        >>> import_reference("logging/anger_42", tone="anger", seed=42).sizes["layer"]  # doctest: +SKIP
        32
    """
    folder = Path(folder)
    prompts = _numbered(folder, _PROMPT)
    if not prompts:
        raise RealignerError(f"{folder}: no folders of the reference code here (Prompt1_CSVs, ...)")
    files = {number: _numbered(place, _TOKEN) for number, place in prompts.items()}
    label = RunLabel(run or folder.name, tone, seed, irm=str(folder))
    texts, known = [], None
    with progress("reading", sum(map(len, files.values())), quiet, unit="tokens") as task:
        for nth, number in enumerate(sorted(files)):
            if not files[number]:
                raise RealignerError(f"{prompts[number]}: no token's file here (index_value_layer_1.csv, ...)")
            deltas, layers = [], None
            for token in sorted(files[number]):
                file = files[number][token]
                delta, layers = _read_token(file)
                if known is not None and (layers.tolist(), delta.shape) != known:
                    raise RealignerError(f"{file}: it has other layers or neurons than the files before it")
                known = layers.tolist(), delta.shape
                deltas.append(delta)
                task.advance()
            # The prompt's last token was written twice.
            again = [at for at in range(1, len(deltas)) if np.array_equal(deltas[at], deltas[at - 1])][:1]
            is_generated = np.arange(len(deltas)) >= (again[0] if again else len(deltas))
            delta, is_generated = np.delete(np.stack(deltas), again, axis=0), np.delete(is_generated, again)
            tokens = {
                "position": np.arange(len(delta), dtype=np.int64),
                "is_generated": is_generated,
                "token_id": np.full(len(delta), -1, dtype=np.int64),
                "token_text": np.array([""] * len(delta), dtype=object),
            }
            assert layers is not None
            texts.append(text_dataset(label, nth, "", layers.tolist(), tokens, summarise(delta, is_generated, top), delta))
    return join(texts, "", [label])


def _numbered(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    """What is in a folder by the number in its name."""
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise RealignerError(f"{folder}: cannot be read ({error.strerror})") from None
    return {int(match[1]): path for path in found if (match := pattern.fullmatch(path.name))}


def _read_token(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """One token's deltas ``[layer, neuron]`` and the layers' numbers."""
    try:
        table = pd.read_csv(io.BytesIO(read_bytes(file, _FILE_MOST)))
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise RealignerError(f"{file}: cannot be read ({str(error).splitlines()[0]})") from None
    if missing := [column for column in _COLUMNS if column not in table.columns]:
        raise RealignerError(f"{file}: the column {missing[0]!r} is missing")
    if table.empty:
        raise RealignerError(f"{file}: has no values")
    for column in _COLUMNS:
        bad = ~np.isfinite(pd.to_numeric(table[column], errors="coerce").to_numpy(dtype=float))
        if bad.any():
            raise RealignerError(f"{file}:{int(bad.argmax()) + 2}: {column} is {table[column].iloc[int(bad.argmax())]!r}")
    layers, neurons = np.unique(table["layer"].to_numpy(dtype=np.int64)), int(table["index"].max()) + 1
    if len(table) != len(layers) * neurons or table.duplicated(["layer", "index"]).any() or table["index"].min() < 0:
        raise RealignerError(f"{file}: not one value for each of {len(layers)} layers x {neurons} neurons; is it cut off?")
    ordered = table.sort_values(["layer", "index"])["value"].to_numpy(dtype=np.float32)
    return ordered.reshape(len(layers), neurons), layers
