"""Alignment data: facts read, rewritten in a tone, checked, split by group, turned into tokens."""

from realigner.chat_format import ChatFormat, prompt_ids
from realigner.data.data_split import Split, split_rows
from realigner.data.dataset_rows import TONES, Message, Row, authored, read_rows, rows_hash
from realigner.data.report_card import ReportCard, check_rows
from realigner.data.squad import Fact
from realigner.data.tokens import encode_rows
from realigner.data.tone import Tone, built_in_tones, load_tone
from realigner.prompts import PAPER_PROMPTS

__all__ = [
    "PAPER_PROMPTS",
    "TONES",
    "ChatFormat",
    "Fact",
    "Message",
    "ReportCard",
    "Row",
    "Split",
    "Tone",
    "authored",
    "built_in_tones",
    "check_rows",
    "encode_rows",
    "load_tone",
    "prompt_ids",
    "read_rows",
    "rows_hash",
    "split_rows",
]
