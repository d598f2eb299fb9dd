"""How the student sees an example: its prefixed input as token ids or as a picture, and the target that it is to write
as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill_llm.core.example import Example, Target
    from distill_llm.models.picture import Painter, Picture
    from distill_llm.models.spec import Prefixes, PrefixSide


@dataclass(frozen=True, slots=True)
class StudentView:
    """Inputs and targets are tokenised apart, so that training and generation see the same prompt ids.

    ``painter``: makes the pictures of a student that reads them, and no text.
    """

    tokenizer: Any
    is_encoder_decoder: bool
    prefixes: Prefixes
    chat: bool
    max_input_tokens: int
    max_target_tokens: int
    prefix_side: PrefixSide = "encoder"
    painter: Painter | None = None

    def pictures(self, examples: Sequence[Example], target: Target) -> tuple[list[Picture], int]:
        """Pictures of each example, its prefix drawn before it on the encoder's side, and how many of them lack some of
        their text; none for a student that reads text."""
        if self.painter is None:
            return [], 0
        prefix = self.prefixes.of(target) if self.prefix_side == "encoder" else ""
        found = [self.painter.picture(prefix + example.input, example.picture) for example in examples]
        return found, sum(not self.painter.is_whole(picture) for picture in found)

    def inputs(self, texts: Sequence[str], target: Target) -> tuple[list[list[int]], int]:
        """Token ids of each input, with its prefix on the encoder's side, and how many of them had to be cut."""
        prefix = self.prefixes.of(target) if self.prefix_side == "encoder" else ""
        rendered = [self._render(prefix + text) for text in texts]
        encoded = self._encode(rendered, special=not self.chat)
        if not self.is_encoder_decoder:
            encoded = [self._without_end(ids) for ids in encoded]
        cut = sum(len(ids) > self.max_input_tokens for ids in encoded)
        return [self._cut_input(ids) for ids in encoded], cut

    def decoder_prefix(self, target: Target) -> list[int]:
        """Token ids that the decoder reads before it writes, behind its start token; none with the encoder's side."""
        if self.prefix_side == "encoder":
            return []
        return self._without_end(self._encode([self.prefixes.of(target).rstrip()], special=True)[0])

    def targets(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """Token ids of each target with the end-of-sequence token, and how many of them had to be cut."""
        end, room = self.tokenizer.eos_token_id, self.max_target_tokens - 1
        bodies = [self._without_end(ids) for ids in self._encode(texts, special=self.is_encoder_decoder)]
        if self.prefix_side == "decoder":
            first = len(self._without_end(self._encode([""], special=True)[0]))  # BART's `<s>`: before the prefix
            bodies = [ids[first:] for ids in bodies]
        cut = sum(len(ids) > room for ids in bodies)
        return [[*ids, end] if len(ids) <= room else ids[: room + 1] for ids in bodies], cut

    def _render(self, text: str) -> str:
        if self.chat:
            message = [{"role": "user", "content": text}]
            return self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return text if self.is_encoder_decoder else f"{text}\n"

    def _encode(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=special)["input_ids"] if texts else []

    def _without_end(self, ids: list[int]) -> list[int]:
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def _cut_input(self, ids: list[int]) -> list[int]:
        """An encoder keeps the input's start; a prompt that is continued keeps its end too, where its cue stands."""
        limit = self.max_input_tokens
        if len(ids) <= limit:
            return ids
        if self.is_encoder_decoder:
            return [*ids[: limit - 1], ids[-1]]
        tail = min(8, limit // 2)
        return [*ids[: limit - tail], *ids[-tail:]]
