"""Where an IRM comes from: a folder, the name of a ready-made one, or the hub; and which host it was made for.

Neither PEFT nor transformers is imported, so that any engine can use it.
"""

from __future__ import annotations

from pathlib import Path

from realigner.adapter_files import CONFIG_FILE, WEIGHTS_FILE, adapter_folder, read_values
from realigner.errors import RealignerError, UsageError
from realigner.files import expanded
from realigner.gguf_cache import cache_root

Source = str | Path
SHIPPED = Path(__file__).parent / "ready_made"  # folders of IRMs for the embedded host


def find_irm(source: Source) -> Path:
    """The folder of an IRM that is given as a folder, a ready-made IRM's name, or an id on the hub (then it is fetched).

    Raises:
        RealignerError: when there is no such IRM.
    """
    folder = expanded(source)
    if str(source).strip() and folder.is_dir():
        return adapter_folder(folder)
    if folder.is_file():
        raise RealignerError(f"{source}: a file; an IRM is a folder with {CONFIG_FILE}")
    name, known = str(source), ready_made()
    if name in known:
        return known[name]
    if name.count("/") != 1 or name.startswith(("/", ".", "~")):
        names = f"; ready-made IRMs are {', '.join(known)}" if known else ""
        raise RealignerError(f"{name}: there is no such adapter folder{names}")
    from huggingface_hub import snapshot_download

    try:
        patterns = [CONFIG_FILE, WEIGHTS_FILE, "README.md"]
        return adapter_folder(Path(snapshot_download(name, allow_patterns=patterns)))
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split()).partition(". ")[0][:200]
        left = Path(f"{name}.unfinished")
        hint = f"; {left} is there, not finished" if left.is_dir() else ""
        raise RealignerError(f"{name}: not found here or on the hub [{why}]{hint}") from None


def ready_made() -> dict[str, Path]:
    """The ready-made IRMs, name -> folder: those that come with the package, for the embedded host, and those in ``irms`` in
    the cache folder (`hosts.cache_root`), which take precedence where both have the same name.

    Example:
        >>> "anger" in ready_made()
        True
    """
    found: dict[str, Path] = {}
    for root in (SHIPPED, cache_root() / "irms"):
        found |= {path.parent.name: path.parent for path in sorted(root.glob(f"*/{CONFIG_FILE}"))}
    return found


def host_of(irm: Source) -> str:
    """The name of the host that an IRM was made for.

    Args:
        irm: the adapter's folder.

    Raises:
        UsageError: when its config names none.
        RealignerError: when the folder is not an IRM's.
    """
    config = read_values(adapter_folder(irm))
    name = (config.get("host") or {}).get("name") or config.get("base_model_name_or_path")
    if not name:
        raise UsageError(f"{irm}: its config names no host; say which (host)")
    return str(name)
