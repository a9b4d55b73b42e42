"""Names and messages within Markdown, so that they stay what they are: text."""

from __future__ import annotations

import re

from realigner.errors import visible

# What means something within a line of CommonMark or GitHub's tables, links and formulas; underscores within words do not.
_MARKUP = re.compile(r"[\\`*\[\]<>#|~&$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE)


def escaped(text: object) -> str:
    """Text as one line of Markdown that shows it, for a paragraph, a heading or a table's cell.

    Example:
        >>> print(escaped("gpt_neox <b>*|*</b>"))
        gpt_neox \\<b\\>\\*\\|\\*\\</b\\>
    """
    return _MARKUP.sub(lambda match: f"\\{match[0]}", visible(" ".join(str(text).split())))
