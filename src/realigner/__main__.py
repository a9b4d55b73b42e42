"""``python -m realigner``."""

from realigner.cli import entry

entry()
