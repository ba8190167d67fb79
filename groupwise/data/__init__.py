"""Files and datasets to prompts: reading, checking, chat rendering, the resumable sampler, the GSM8K converter.

Importing this loads neither torch nor transformers nor datasets.
"""

from __future__ import annotations

from groupwise.data.chat import (
    EncodedConversation,
    check_read,
    check_template,
    encode_conversation,
    encode_rendered,
    encode_text,
    encode_text_pair,
    render,
    set_chat_template,
)
from groupwise.data.files import Source, SourceRow, read_rows
from groupwise.data.gsm8k import Gsm8kCounts, convert_gsm8k
from groupwise.data.prompts import PromptSet, check_rows, load_prompts
from groupwise.data.rows import RowProblem
from groupwise.data.sampler import PromptSampler, StreamItem
from groupwise.data.stats import DataStats, Lengths, data_stats
from groupwise.data.supervised import SupervisedSet, check_supervised_rows, load_supervised

__all__ = [
    "DataStats",
    "EncodedConversation",
    "Gsm8kCounts",
    "Lengths",
    "PromptSampler",
    "PromptSet",
    "RowProblem",
    "Source",
    "SourceRow",
    "StreamItem",
    "SupervisedSet",
    "check_read",
    "check_rows",
    "check_supervised_rows",
    "check_template",
    "convert_gsm8k",
    "data_stats",
    "encode_conversation",
    "encode_rendered",
    "encode_text",
    "encode_text_pair",
    "load_prompts",
    "load_supervised",
    "read_rows",
    "render",
    "set_chat_template",
]
