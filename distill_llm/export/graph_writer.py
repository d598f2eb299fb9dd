"""Texts of a model that was cut into graphs, whatever runs them.

B rows, T positions, V vocabulary, C channels, H and W rows and columns of pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from distill_llm.core.files import read_json, write_json
from distill_llm.export.base import Answering
from distill_llm.models.generate import Written, end_tokens
from distill_llm.models.load import read_tokenizer

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from distill_llm.models.graphs import Graph
    from distill_llm.models.load import LoadedModel

FACTS = "graphs.json"
Arrays = dict[str, np.ndarray]


class Runner(Protocol):
    """One graph in its runtime. It is called with arrays by name, of which it takes those that it has."""

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> Arrays: ...


def save_facts(student: LoadedModel, graphs: Mapping[str, Graph], folder: Path) -> None:
    """Writes what a loop around the graphs has to know."""
    from distill_llm.models.graphs import past_shapes

    config, tokenizer = student.model.config, student.tokenizer
    facts = {
        "graphs": sorted(graphs),
        "decoder_start": config.decoder_start_token_id if config.is_encoder_decoder else None,
        "ends": end_tokens(student.model, tokenizer),
        "pad": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        "past": past_shapes(graphs),
        "forced_first": _token(student.model.generation_config.forced_bos_token_id),
        "forced_last": _token(student.model.generation_config.forced_eos_token_id),
    }
    write_json(folder / FACTS, facts)


class GraphWriter:
    """Greedy texts of an encoder and a decoder, or of a decoder alone, that keep keys and values as arrays."""

    def __init__(self, runners: Mapping[str, Runner], folder: Path, answering: Answering):
        facts = read_json(folder / FACTS)
        self._encoder, self._decoder = runners.get("encoder"), runners["decoder"]
        self._tokenizer = read_tokenizer(str(folder), where=str(folder))
        self._begin = [facts["decoder_start"], *answering.decoder_prefix]
        self._ends, self._pad, self._past = facts["ends"], facts["pad"], facts["past"]
        self._most = answering.max_new_tokens
        self._forced = {self._most - 1: facts["forced_last"]}
        if self._encoder is not None and len(self._begin) == 1:
            self._forced[0] = facts["forced_first"]

    def write_ids(self, prompts: Sequence[Sequence[int]]) -> list[Written]:
        lengths = [len(prompt) for prompt in prompts]
        if self._encoder is None:
            ids, mask = self._padded(prompts, left=True)
            positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
            return self._write(ids, {"attention_mask": mask, "position_ids": positions}, lengths)
        ids, mask = self._padded(prompts, left=False)
        beside = self._encoder({"input_ids": ids, "attention_mask": mask})
        return self._write(self._begun(len(ids)), beside | {"attention_mask": mask}, lengths)

    def write_pictures(self, pixels: Float[Tensor, "B C H W"]) -> list[Written]:
        assert self._encoder is not None, "a model that sees has an encoder"
        return self._write(self._begun(len(pixels)), self._encoder({"pixel_values": pixels.numpy()}), [0] * len(pixels))

    def _write(self, ids: np.ndarray, beside: Arrays, lengths: Sequence[int]) -> list[Written]:
        """``beside``: what the decoder reads at each step besides tokens and past; of a decoder alone it grows."""
        grows = self._encoder is None
        past = self._empty(len(ids))
        texts: list[list[int]] = [[] for _ in lengths]
        rows = list(range(len(lengths)))
        for step in range(self._most):
            out = self._decoder({"input_ids": ids, **beside, **past})
            chosen = self._choose(out.pop("logits"), step)
            past = {name.replace("present", "past", 1): value for name, value in out.items()}
            for row, token in zip(rows, chosen.tolist(), strict=True):
                texts[row].append(token)
            ids = chosen[:, None].astype(np.int64)
            if grows:
                beside = _grown(beside)
            going = [place for place, token in enumerate(chosen.tolist()) if token not in self._ends]
            if not going:
                break
            if len(going) < len(rows):  # what has ended would cost as much as what has not
                rows = [rows[place] for place in going]
                ids = ids[going]
                past, beside = ({name: value[going] for name, value in part.items()} for part in (past, beside))
        return [self._read(ids, tokens_in) for ids, tokens_in in zip(texts, lengths, strict=True)]

    def _choose(self, logits: Float[np.ndarray, "B V"], step: int) -> np.ndarray:
        """The likeliest token of each row, or the one that a model of BART's family must begin or stop with."""
        forced = self._forced.get(step)
        return logits.argmax(axis=-1) if forced is None else np.full(len(logits), forced)

    def _read(self, ids: list[int], tokens_in: int) -> Written:
        ended = ids[-1] in self._ends
        kept = ids[:-1] if ended else ids
        text = self._tokenizer.decode(kept, skip_special_tokens=True).strip()
        end = ids[-1] if ended else None
        return Written(text, tokens_in, len(kept), cut=not ended, ids=tuple(kept), end=end)

    def _begun(self, rows: int) -> np.ndarray:
        return np.tile(np.array([self._begin], dtype=np.int64), (rows, 1))

    def _empty(self, rows: int) -> Arrays:
        shapes = enumerate(self._past)
        return {
            f"past.{layer}.{part}": np.zeros((rows, heads, 0, size), dtype=np.float32)
            for layer, (heads, size) in shapes
            for part in ("key", "value")
        }

    def _padded(self, prompts: Sequence[Sequence[int]], *, left: bool) -> tuple[np.ndarray, np.ndarray]:
        width = max(len(prompt) for prompt in prompts)
        ids = np.full((len(prompts), width), self._pad, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            place = slice(width - len(prompt), width) if left else slice(0, len(prompt))
            ids[row, place], mask[row, place] = prompt, 1
        return ids, mask


def _token(setting: Any) -> int | None:
    return setting if isinstance(setting, int) else None


def _grown(beside: Arrays) -> Arrays:
    """Mask and positions for one more token."""
    mask, positions = beside["attention_mask"], beside["position_ids"]
    return {
        "attention_mask": np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1),
        "position_ids": positions[:, -1:] + 1,
    }


def inputs_of(wanted: Sequence[str], given: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Those of the arrays that a graph has inputs for: one that nothing depends on is left out of it."""
    return {name: given[name] for name in wanted}
