"""Which tokens of one tokenizer are the counterparts of another's, in the same text."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

from distill_llm.core.errors import ConfigError


def places_by_position(num_tokens: int, num_others: int) -> list[int]:
    """The first with the first and so on, until one of them ends."""
    return [place if place < num_others else -1 for place in range(num_tokens)]


def places_by_text(starts: Sequence[int], others: Sequence[int]) -> list[int]:
    """Each token with the one that begins at the same character, which is then predicted from the same text; -1: none.

    Where several begin there (white space and a word, the bytes of a character), the first is meant, on both sides.
    """
    first: dict[int, int] = {}
    for place, start in enumerate(others):
        first.setdefault(start, place)
    seen: set[int] = set()
    places = []
    for start in starts:
        places.append(-1 if start < 0 or start in seen else first.get(start, -1))
        seen.add(start)
    return places


def token_starts(tokenizer: Any, texts: Sequence[str], *, special: bool, where: str) -> list[list[int]]:
    """At which character of its text each token begins, that of the end of the text last.

    White space before a word belongs to the word's token in some tokenizers, to a token of its own or to none in
    others: a word begins where the text before it ends. A special token begins nowhere (-1). An end of sequence that
    the tokenizer adds itself is left out.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"{where}: its tokenizer ({type(tokenizer).__name__}) does not say where in a text its tokens stand. Set "
            "`align: position`."
        )
    if not texts:
        return []
    encoded = tokenizer(
        list(texts), add_special_tokens=special, return_offsets_mapping=True, return_special_tokens_mask=True
    )
    found = []
    columns = (encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"])
    for text, ids, spans, mask in zip(texts, *columns, strict=True):
        starts = [-1 if is_special else _start(text, span[0]) for span, is_special in zip(spans, mask, strict=True)]
        if ids and ids[-1] == tokenizer.eos_token_id:
            starts.pop()
        found.append([*starts, _start(text, len(text))])
    return found


def _start(text: str, start: int) -> int:
    return len(text[:start].rstrip())


def places_in_completion(ids: Sequence[int], completion: Sequence[int], tokenizer: Any) -> list[int]:
    """For each of a target's tokens, which of those that a teacher wrote with the same tokenizer it is; -1: none.

    What was written begins with the target, but may be cut into other tokens there (white space before it is gone) and
    where it ends. Equal tokens are counterparts where the text before them is the same too: what was written twice is
    then not taken for each other.
    """
    places, length = [-1] * len(ids), len(_text(tokenizer, ids))
    # What comes behind the target may repeat it in longer runs than its own, which would hide these.
    end = bisect_left(range(len(completion)), length, key=lambda size: len(_text(tokenizer, completion[:size])))
    completion = completion[:end]
    runs = SequenceMatcher(None, list(ids), list(completion), autojunk=False).get_matching_blocks()
    for start, other, size in runs:
        if size and _text(tokenizer, ids[:start]) == _text(tokenizer, completion[:other]):
            places[start : start + size] = range(other, other + size)
    return places


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Without special tokens, and without white space, which a text loses at its ends."""
    return "".join(tokenizer.decode(list(ids), skip_special_tokens=True).split()) if ids else ""
