"""The tokens of a prompt: of plain text as it is, of a chat through the tokenizer's template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Turn(Protocol):
    """One turn of a chat."""

    @property
    def role(self) -> str: ...

    @property
    def content(self) -> str: ...


def prompt_ids(tokenizer: Any, prompt: str | Sequence[Turn]) -> list[int]:
    """The tokens that the model reads, special ones included; a chat ends where the assistant's turn begins."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    encoded = tokenizer.apply_chat_template(turns(prompt), add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(encoded["input_ids"])


def turns(chat: Sequence[Turn]) -> list[dict[str, str]]:
    """A chat as chat templates and servers want it."""
    return [{"role": turn.role, "content": turn.content} for turn in chat]
