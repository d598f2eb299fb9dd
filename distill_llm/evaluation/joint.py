"""Texts of several models as one: at each place the word that their mean distribution holds likeliest.

B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    Mix = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True, slots=True)
class JointText:
    """One continuation, without special tokens."""

    text: str


class JointGenerator:
    """Greedy, for a handful of short texts: without a cache of what was read, each token reads all before it anew.

    All ``models`` have the words of ``tokenizer``, and are of one family; ``mix`` makes one distribution of theirs.
    """

    def __init__(
        self,
        models: Sequence[Any],
        tokenizer: Any,
        mix: Mix,
        *,
        max_new_tokens: int,
        decoder_prefix: Sequence[int] = (),
    ):
        self._models, self._tokenizer, self._mix = tuple(models), tokenizer, mix
        self._max_new_tokens, self._prefix = max_new_tokens, tuple(decoder_prefix)
        self._width = max(tokenizer.get_vocab().values()) + 1
        self._ends = {tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
        self._reads_apart = bool(self._models[0].config.is_encoder_decoder)
        for model in self._models:
            model.eval()

    def write_ids(self, prompts: Sequence[Sequence[int]]) -> list[JointText]:
        """One continuation a prompt, in order."""
        import torch

        found: dict[int, list[int]] = {}
        with torch.inference_mode():
            for rows in self._groups(prompts):
                found |= zip(rows, self._continue([prompts[row] for row in rows]), strict=True)
        decode = self._tokenizer.decode
        return [JointText(decode(found[row], skip_special_tokens=True).strip()) for row in range(len(prompts))]

    def _groups(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Rows that go together: prompts of one length, where padding would stand before what is written."""
        if self._reads_apart:
            return [list(range(len(prompts)))]
        groups: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(len(prompt), []).append(row)
        return list(groups.values())

    def _continue(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        import torch

        readers = [self._reader(model, prompts) for model in self._models]
        begun = 0
        written: list[Tensor] = []
        done = torch.zeros(len(prompts), dtype=torch.bool, device=self._models[0].device)
        ends = torch.tensor(sorted(self._ends), device=done.device)
        while begun < self._max_new_tokens and not bool(done.all()):
            so_far = torch.stack(written, 1) if written else done.new_zeros(len(prompts), 0, dtype=torch.long)
            chosen = self._mix([read(so_far)[:, : self._width] for read in readers]).argmax(-1)
            written.append(chosen)
            done = done | torch.isin(chosen, ends)
            begun += 1
        return [self._until_end(row) for row in torch.stack(written, 1).tolist()]

    def _reader(self, model: Any, prompts: Sequence[Sequence[int]]) -> Callable[[Int[Tensor, "B T"]], Tensor]:
        """Gives a model's logits of the next token, behind what was written so far."""
        import torch

        pad, device = self._tokenizer.pad_token_id, model.device
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[*prompt, *[pad] * (width - len(prompt))] for prompt in prompts], device=device)
        if not self._reads_apart:
            return lambda so_far: model(input_ids=torch.cat([ids, so_far], 1)).logits[:, -1]
        mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts], device=device)
        states = model.get_encoder()(input_ids=ids, attention_mask=mask)
        start = torch.tensor([model.config.decoder_start_token_id, *self._prefix], device=device)
        begin = start.expand(len(prompts), -1)
        return lambda so_far: model(
            encoder_outputs=states, attention_mask=mask, decoder_input_ids=torch.cat([begin, so_far], 1)
        ).logits[:, -1]

    def _until_end(self, ids: Sequence[int]) -> list[int]:
        count = next((place for place, token in enumerate(ids) if token in self._ends), len(ids))
        return list(ids[:count])
