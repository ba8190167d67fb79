"""Where prompts come from and how rows become prompts."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from groupwise.config.base import Section


class DataConfig(Section):
    train: str = Field("", description="JSONL, Parquet or CSV file, or a folder written by datasets' save_to_disk")
    eval: str = Field("", description="held-out rows, in any of the same formats")
    prompt_column: str = Field("prompt", description="text or a list of messages")
    question_column: str | None = Field(None, description="use this text column as the user's message instead")
    answer_column: str | None = Field(
        None, description="the reference answer; rewards see it as `answer`, supervised training learns it"
    )
    data_source: str | None = Field(None, description="routes rewards for rows that have no data_source column")
    system_prompt: str | None = Field(None, description="put before every conversation that has no system message")
    few_shot: tuple[dict[str, str], ...] = Field((), description="messages put between system prompt and question")
    chat_template_kwargs: dict[str, Any] = Field({}, description="given to the chat template, e.g. enable_thinking")
    max_prompt_tokens: int = Field(1024, ge=1, description="longer prompts are left out and counted, never cut")
    shuffle: bool = Field(True, description="a new order each epoch, decided by train.seed")
