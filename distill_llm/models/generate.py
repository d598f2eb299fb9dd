"""Text from a model: the one generation loop of teachers and students.

B rows, T positions, C channels, H and W rows and columns of pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from distill_llm.models.prefix import MIN_TOKENS, SharedPrefix, common_prefix, has_plain_cache
from distill_llm.models.sampling import StepScores, TokenChooser
from distill_llm.models.stopping import StopTexts, first_stop, tokens_of

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

Item = TypeVar("Item")

_STEPS = 32  # between two looks at which rows have ended: dropping them costs a copy of the cache
_CPU_ENCODER_TOKENS = 2048  # attention over all of a batch of long prompts would leave the processor's cache
# What a model's own generation config may ask for, and a recipe does not: text is decided by the recipe alone.
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "do_sample": False,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "max_length": None,
    "cache_implementation": None,
}


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, slots=True)
class Written:
    """One continuation, without special tokens and without the text that stopped it.

    ``tokens_out``, ``ids`` and ``scores`` are of the tokens of ``text``. ``cut``: it ran into the limit of new tokens.
    ``end`` is the token behind them that ended it; None where none did.
    """

    text: str
    tokens_in: int
    tokens_out: int
    cut: bool = False
    ids: tuple[int, ...] = ()
    scores: StepScores | None = None
    end: int | None = None


class Generator:
    """Continues texts, or token ids that are there already. Greedy at temperature 0.

    At a higher one each row is drawn with the random numbers of its own key, so that a text does not depend on the
    batch that it is written in. The model's list of end tokens holds; its penalties and its sampling do not.
    ``decoder_prefix``: what an encoder-decoder's decoder reads behind its start token, before it writes.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        top_logprobs: int = 0,
        decoder_prefix: Sequence[int] = (),
    ):
        self._model, self._tokenizer, self._stop = model, tokenizer, tuple(stop)
        self._sampling = {"temperature": temperature, "top_p": top_p, "steps": max_new_tokens}
        self._sampling["top_logprobs"] = top_logprobs
        self._chooses = temperature > 0 or top_logprobs > 0
        self._max_new_tokens = max_new_tokens
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self._decoder_prefix = tuple(decoder_prefix)
        self._ends = end_tokens(model, tokenizer)
        self._plain_cache = has_plain_cache(model)
        self._prefix: SharedPrefix | None = None

    def write(self, texts: Sequence[str], draws: Sequence[str] = ()) -> list[Written]:
        """One batch of continuations, in order; ``draws``: a key a text, needed at a temperature above 0."""
        return self.write_ids(self._tokenizer(list(texts))["input_ids"], draws)

    def write_ids(self, prompts: Sequence[Sequence[int]], draws: Sequence[str] = ()) -> list[Written]:
        """The same for prompts that are token ids."""
        return self._write(lambda: self._inputs(prompts), [len(prompt) for prompt in prompts], draws)

    def write_pictures(self, pixels: Float[Tensor, "B C H W"], draws: Sequence[str] = ()) -> list[Written]:
        """What a vision model writes of pictures; nothing is said of how many tokens it read."""
        inputs = {
            "pixel_values": pixels.to(self._model.device, self._model.dtype),
            "decoder_input_ids": self._begun(len(pixels)),
        }
        return self._write(lambda: (inputs, nullcontext()), [0] * len(pixels), draws)

    def _write(
        self,
        read: Callable[[], tuple[dict[str, Any], AbstractContextManager[None]]],
        lengths: Sequence[int],
        draws: Sequence[str],
    ) -> list[Written]:
        import torch

        was_training = self._model.training
        self._model.eval()
        try:
            with torch.inference_mode():
                inputs, within = read()
                with within:
                    run = self._continue(inputs, draws, len(lengths))
        finally:
            self._model.train(was_training)
        return [
            self._read(ids, length, scores) for ids, length, scores in zip(run.tokens, lengths, run.scores, strict=True)
        ]

    def share_prefix(self, prompts: Sequence[Sequence[int]]) -> int:
        """Reads what all ``prompts`` begin with once, for all batches of them to come; its number of tokens.

        0 where they share too little, or where the model does not allow it. A prefix that is there already is kept
        while the prompts begin with it and share little more.
        """
        import torch

        tokens = common_prefix(prompts) if self._plain_cache else ()
        kept = self._prefix.tokens if self._prefix is not None else ()
        if kept and tokens[: len(kept)] == kept and len(tokens) < len(kept) + MIN_TOKENS:
            return len(kept)
        self._prefix = None
        if len(tokens) < MIN_TOKENS:
            return 0
        was_training = self._model.training
        self._model.eval()
        with torch.inference_mode():
            self._prefix = SharedPrefix(self._model, tokens)
        self._model.train(was_training)
        return len(tokens)

    def write_continuously(self, prompts: Iterable[tuple[Item, Sequence[int]]]) -> Iterator[tuple[Item, Written | str]]:
        """Continuations in any order, each with the item that its prompt came with: a new one starts when one ends.

        Greedy, without stop texts, for decoder-only models. A prompt that failed comes back with the reason.
        """
        from distill_llm.models.continuous import generate_continuously

        found = generate_continuously(
            self._model, prompts, ends=self._ends, pad=self._pad, max_new_tokens=self._max_new_tokens
        )
        for item, tokens_in, result in found:
            yield item, result if isinstance(result, str) else self._read(result, tokens_in)

    def _continue(self, inputs: dict[str, Any], draws: Sequence[str], rows: int) -> _Run:
        """Writes until all rows have ended; those that have are dropped now and then, as they would cost as much."""
        start = inputs["decoder_input_ids" if self._model.config.is_encoder_decoder else "input_ids"].size(1)
        chooser = TokenChooser(draws, **self._sampling) if self._chooses else None
        stops = StopTexts(self._tokenizer, self._stop, start=start, rows=rows) if self._stop else None
        run = _Run(rows, start, self._max_new_tokens, self._ends, chooser, stops)
        while run.left:
            steps = run.limit - run.steps
            out = self._model.generate(
                **inputs,
                **_NEUTRAL,
                max_new_tokens=min(steps, _STEPS) if self._plain_cache and len(run.left) > 1 else steps,
                eos_token_id=self._ends or None,
                pad_token_id=self._pad,
                logits_processor=[chooser] if chooser else [],
                stopping_criteria=[stops] if stops else [],
                return_dict_in_generate=True,
            )
            keep = run.add(out.sequences)
            if run.left:
                inputs = _continued(inputs["attention_mask"], out, keep)
        return run

    def _read(self, ids: Sequence[int], tokens_in: int, scores: StepScores | None = None) -> Written:
        count = next((place for place, token in enumerate(ids) if token in self._ends), len(ids))
        cut = count == self._max_new_tokens
        end = ids[count] if count < len(ids) else None
        text = self._tokenizer.decode(ids[:count], skip_special_tokens=True)
        place = first_stop(text, self._stop)
        if place >= 0:
            text, cut, end = text[:place].rstrip(), False, None
            count = tokens_of(len(text), ids[:count], self._tokenizer)
        kept = scores.first(count) if scores else None
        return Written(text.strip(), tokens_in, count, cut, tuple(ids[:count]), kept, end)

    def _inputs(self, prompts: Sequence[Sequence[int]]) -> tuple[dict[str, Any], AbstractContextManager[None]]:
        """What ``generate`` reads, and within what: right padding for an encoder, left padding for a decoder."""
        if self._model.config.is_encoder_decoder:
            return self._encoded(prompts), nullcontext()
        prefix = self._prefix
        if prefix is None or not prefix.begins(prompts):
            return self._padded(prompts, left=True), nullcontext()
        size = len(prefix.tokens)
        padded = self._padded([prompt[size:] for prompt in prompts], left=True)
        inputs = {
            "input_ids": _with_prefix(prefix.tokens, padded["input_ids"]),
            "attention_mask": _with_prefix([1] * size, padded["attention_mask"]),
            "past_key_values": prefix.cache(len(prompts)),
        }
        return inputs, prefix.attended()

    def _encoded(self, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Encoder states: of several samples of a prompt once, and on a CPU in parts that its cache holds."""
        import torch
        from torch.nn.functional import pad
        from transformers.modeling_outputs import BaseModelOutput

        distinct = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
        place = {prompt: row for row, prompt in enumerate(distinct)}
        rows = [place[tuple(prompt)] for prompt in prompts]
        padded = self._padded(distinct, left=False)
        width = padded["input_ids"].size(1)
        size = max(1, _CPU_ENCODER_TOKENS // width) if self._model.device.type == "cpu" else len(distinct)
        states = []
        for start in range(0, len(distinct), size):
            part = self._padded(distinct[start : start + size], left=False)
            found = self._model.get_encoder()(**part).last_hidden_state
            states.append(pad(found, (0, 0, 0, width - found.size(1))))
        outputs = BaseModelOutput(last_hidden_state=torch.cat(states)[rows])
        return {
            "encoder_outputs": outputs,
            "attention_mask": padded["attention_mask"][rows],
            "decoder_input_ids": self._begun(len(rows)),
        }

    def _begun(self, rows: int) -> Int[Tensor, "B T"]:
        """What the decoder reads before it writes."""
        import torch

        begin = [self._model.config.decoder_start_token_id, *self._decoder_prefix]
        return torch.tensor([begin], device=self._model.device).expand(rows, -1)

    def _padded(self, prompts: Sequence[Sequence[int]], *, left: bool) -> dict[str, Any]:
        import torch

        width = max(len(prompt) for prompt in prompts)
        rows, masks = [], []
        for prompt in prompts:
            gap = width - len(prompt)
            rows.append([self._pad] * gap + list(prompt) if left else list(prompt) + [self._pad] * gap)
            masks.append([0] * gap + [1] * len(prompt) if left else [1] * len(prompt) + [0] * gap)
        device = self._model.device
        return {
            "input_ids": torch.tensor(rows, device=device),
            "attention_mask": torch.tensor(masks, device=device),
        }


class _Run:
    """What the rows of a batch have written so far. ``left``: those that still write."""

    def __init__(
        self,
        rows: int,
        start: int,
        limit: int,
        ends: Sequence[int],
        chooser: TokenChooser | None,
        stops: StopTexts | None,
    ):
        self.limit, self.steps, self.left = limit, 0, list(range(rows))
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.scores: list[StepScores | None] = [None] * rows
        self._start, self._ends, self._chooser, self._stops = start, set(ends), chooser, stops

    def add(self, sequences: Int[Tensor, "B T"]) -> list[int]:
        """Takes up what ``left`` wrote, and gives the places among them of those that go on."""
        new = sequences[:, self._start + self.steps :].tolist()
        self.steps += len(new[0])
        for row, tokens in zip(self.left, new, strict=True):
            self.tokens[row] += tokens
        if self._chooser is not None:
            for row, noted in zip(self.left, self._chooser.take(), strict=False):
                before = self.scores[row]
                self.scores[row] = noted if before is None else before + noted
        keep = [place for place, row in enumerate(self.left) if self._goes_on(place, self.tokens[row])]
        self.left = [self.left[place] for place in keep]
        for watcher in (self._chooser, self._stops):
            if watcher is not None:
                watcher.keep(keep)
        return keep

    def _goes_on(self, place: int, tokens: list[int]) -> bool:
        stopped = self._stops is not None and self._stops.done[place]
        return self.steps < self.limit and not stopped and not self._ends.intersection(tokens)


def _continued(mask: Int[Tensor, "B T"], out: Any, keep: list[int]) -> dict[str, Any]:
    """Inputs with which the rows in ``keep`` go on: what they wrote is in their cache."""
    import torch

    new = out.sequences.size(1) - mask.size(1)
    mask = torch.cat([mask, mask.new_ones(len(mask), new)], dim=1)
    if len(keep) < len(mask):
        out.past_key_values.batch_select_indices(mask.new_tensor(keep))
    return {
        "input_ids": out.sequences[keep],
        "attention_mask": mask[keep],
        "past_key_values": out.past_key_values,
    }


def _with_prefix(prefix: Sequence[int], rows: Int[Tensor, "B T"]) -> Int[Tensor, "B P+T"]:
    import torch

    return torch.cat([rows.new_tensor(prefix).expand(len(rows), -1), rows], dim=1)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Each token that ends a text: the model may name several, such as the end of a turn."""
    of_model = getattr(model, "generation_config", None) and model.generation_config.eos_token_id
    listed = of_model if isinstance(of_model, list) else [of_model]
    found = [*listed, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return sorted({token for token in found if token is not None})
