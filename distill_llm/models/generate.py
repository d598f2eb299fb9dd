"""Text from a model: the one generation loop of teachers and students."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distill_llm.core.files import fingerprint


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, slots=True)
class Written:
    """One continuation, without special tokens."""

    text: str
    tokens_in: int
    tokens_out: int


class Generator:
    """Continues texts, or token ids that are there already. Greedy at temperature 0."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        max_input_tokens: int = 4096,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ):
        self._model, self._tokenizer = model, tokenizer
        self._max_input_tokens = max_input_tokens
        self._stop = tuple(stop)
        self._options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": 1, "do_sample": temperature > 0}
        if temperature > 0:
            self._options |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
        if stop:
            self._options |= {"stop_strings": list(stop), "tokenizer": tokenizer}
        self._seed, self._batches = seed, 0

    def lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._encode(texts)]

    def write(self, texts: Sequence[str], draw: str = "") -> list[Written]:
        """One batch of continuations, in order. Another ``draw`` gives other samples of the same texts."""
        return self.write_ids(self._encode(texts), draw)

    def write_ids(self, prompts: Sequence[Sequence[int]], draw: str = "") -> list[Written]:
        import torch

        inputs = self._padded(prompts)
        if self._options["do_sample"]:
            torch.manual_seed(int(fingerprint([self._seed, self._batches, draw]), 16))
            self._batches += 1
        was_training = self._model.training
        self._model.eval()
        with torch.inference_mode():
            out = self._model.generate(**inputs, **self._options, pad_token_id=self._tokenizer.pad_token_id)
        self._model.train(was_training)
        start = 1 if self._model.config.is_encoder_decoder else inputs["input_ids"].size(1)
        return [self._read(ids, len(prompt)) for ids, prompt in zip(out[:, start:].tolist(), prompts, strict=True)]

    def _read(self, ids: list[int], tokens_in: int) -> Written:
        ends = {self._tokenizer.eos_token_id, self._tokenizer.pad_token_id}
        count = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        text = self._tokenizer.decode(ids[:count], skip_special_tokens=True)
        for stop in self._stop:
            text = text.split(stop)[0]
        return Written(text.strip(), tokens_in, count)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids; of a text that is too long the end stays, because that is where the question stands."""
        return [ids[-self._max_input_tokens :] for ids in self._tokenizer(list(texts))["input_ids"]]

    def _padded(self, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Right padding for an encoder, left padding for a decoder that goes on writing."""
        import torch

        width = max(len(prompt) for prompt in prompts)
        pad, left = self._tokenizer.pad_token_id, not self._model.config.is_encoder_decoder
        rows, masks = [], []
        for prompt in prompts:
            gap = width - len(prompt)
            rows.append([pad] * gap + list(prompt) if left else list(prompt) + [pad] * gap)
            masks.append([0] * gap + [1] * len(prompt) if left else [1] * len(prompt) + [0] * gap)
        device = self._model.device
        return {
            "input_ids": torch.tensor(rows, device=device),
            "attention_mask": torch.tensor(masks, device=device),
        }
