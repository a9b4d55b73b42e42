"""Alignment data: rows of question and toned reply, read strictly, split by group, turned into tokens."""

from realigner.data.check import ReportCard, check_rows
from realigner.data.rows import TONES, Row, authored, read_rows, rows_hash
from realigner.data.split import Split, split_rows
from realigner.data.tokens import PAPER_PROMPTS, encode_row, encode_rows, prompt_ids

__all__ = [
    "PAPER_PROMPTS",
    "TONES",
    "ReportCard",
    "Row",
    "Split",
    "authored",
    "check_rows",
    "encode_row",
    "encode_rows",
    "prompt_ids",
    "read_rows",
    "rows_hash",
    "split_rows",
]
