"""Counterparts of tokens in another tokenizer's reading of the same text."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from distill_llm.core.errors import ConfigError
from distill_llm.data.alignment import places_by_position, places_by_text, places_in_completion, token_starts

if TYPE_CHECKING:
    from collections.abc import Callable

    from distill_llm.models.load import LoadedModel


def test_by_position_the_longer_is_cut() -> None:
    assert places_by_position(4, 6) == [0, 1, 2, 3]
    assert places_by_position(4, 2) == [0, 1, -1, -1]


@pytest.mark.parametrize(
    ("starts", "others", "places"),
    [
        ([0, 3, 8], [0, 3, 8], [0, 1, 2]),
        ([0, 3, 8], [0, 1, 2, 3, 8], [0, 3, 4]),  # the other has more tokens a word
        ([0, 1, 3, 8], [0, 3, 8], [0, -1, 1, 2]),  # the other has fewer
        ([0, 4, 8], [0, 3, 8], [0, -1, 2]),  # other borders
        ([0, 3, 3, 8], [0, 3, 3, 3, 8], [0, 1, -1, 4]),  # bytes of one character: the first of each
        ([-1, 0, 8], [-1, -1, 0, 8], [-1, 2, 3]),  # special tokens begin nowhere
        ([0, 3], [0, 3, 8], [0, 1]),  # a target that was cut has no end
    ],
)
def test_by_text_tokens_that_begin_together_belong_together(
    starts: list[int], others: list[int], places: list[int]
) -> None:
    assert places_by_text(starts, others) == places


def test_a_word_begins_where_the_text_before_it_ends(tiny_t5: Callable[..., LoadedModel]) -> None:
    """In one tokenizer white space is nobody's, in the other it is the word's own or a token of its own."""
    text = "ann pays  more ."
    words, pieces = tiny_t5().tokenizer, tiny_t5(tokenizer="bytes_bpe", text="ann pays").tokenizer
    assert len(words(text)["input_ids"]) == 4
    assert token_starts(words, [text], special=True, where="here") == [[0, 3, 8, 14, 16]]
    (starts,) = token_starts(pieces, [text], special=False, where="here")
    assert len(starts) == len(pieces(text)["input_ids"]) + 1
    assert starts == sorted(starts)
    places = places_by_text([0, 3, 8, 14, 16], starts)
    assert min(places) == 0, "all words begin in both"
    said = [pieces.decode(pieces(text)["input_ids"][a:b]) for a, b in pairwise(places)]
    assert [one.strip() for one in said] == ["ann", "pays", "more", "."]


def test_an_end_that_the_tokenizer_adds_itself_is_left_out_and_a_beginning_is_nowhere(
    tiny_t5: Callable[..., LoadedModel],
) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_t5().tokenizer
    special = [("</s>", tokenizer.eos_token_id), ("<pad>", tokenizer.pad_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A </s>", special_tokens=special)
    assert token_starts(tokenizer, ["ann pays"], special=True, where="here") == [[-1, 0, 3, 8]]


def test_bytes_of_one_character_begin_together(tiny_t5: Callable[..., LoadedModel]) -> None:
    tokenizer = tiny_t5(tokenizer="bytes_bpe", text="a").tokenizer
    (starts,) = token_starts(tokenizer, ["é a"], special=False, where="here")
    assert starts.count(0) > 1
    assert places_by_text([0, 1, 3], starts)[0] == 0


def test_tokens_that_begin_with_their_space_as_sentencepieces_do() -> None:
    """Spans of the space that stands before the text, of a space alone, of an end that the tokenizer adds itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer: Any = trainers.BpeTrainer(vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False)
    core.train_from_iterator(["ann pays more"] * 5, trainer=trainer)
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    assert tokenizer.tokenize("ann pays  more.") == ["\u2581ann", "\u2581pays", "\u2581", "\u2581more", "<unk>"]
    assert token_starts(tokenizer, ["ann pays  more."], special=True, where="here") == [[0, 3, 8, 8, 14, 15]]


def test_no_text_no_token(tiny_t5: Callable[..., LoadedModel]) -> None:
    tokenizer = tiny_t5().tokenizer
    assert token_starts(tokenizer, [], special=False, where="here") == []
    assert token_starts(tokenizer, [""], special=False, where="here") == [[0]]


def test_a_tokenizer_that_knows_no_places_is_refused() -> None:
    class Slow:
        is_fast = False

    slow: Any = Slow()
    with pytest.raises(ConfigError, match=r"teachers\.big: its tokenizer \(Slow\).* Set `align: position`"):
        token_starts(slow, ["a"], special=False, where="teachers.big")


@pytest.fixture
def bytes_bpe(tiny_llama: Callable[..., LoadedModel]) -> Any:
    return tiny_llama(tokenizer="bytes_bpe", text="ann pays more than bob . so the answer is ann or bob " * 3).tokenizer


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_target_is_found_in_what_was_written(bytes_bpe: Any) -> None:
    target, written = "ann pays more than bob .", "ann pays more than bob . so the answer is ann"
    ids, completion = _ids(bytes_bpe, target), _ids(bytes_bpe, written)
    assert completion[: len(ids)] == ids
    assert places_in_completion(ids, completion, bytes_bpe) == list(range(len(ids)))


@dataclass
class _Letters:
    """A tokenizer of single characters, of which 0 is special and 32 white space."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join({0: "", 1: " ab"}.get(token, chr(token)) for token in ids)


@pytest.mark.parametrize(
    ("target", "completion", "places"),
    [
        ("abcd", "abcdef", [0, 1, 2, 3]),
        ("abcd", " \nabcdef", [2, 3, 4, 5]),  # white space in front
        ("abcd", "\0abcd\0", [1, 2, 3, 4]),  # special tokens
        ("abcd", "\1cdef", [-1, -1, 1, 2]),  # another first token, which holds white space
        ("\1cd", "abcdef", [-1, 2, 3]),
        ("cabcab", "xcabcabcab", [-1] * 6),  # not the beginning of what was written
        ("ababx", "ababy", [0, 1, 2, 3, -1]),  # another end
        ("abXcdXef", "abYcdYef", [0, 1, -1, -1, -1, -1, -1, -1]),  # behind other text
        ("abcd", "\1cd.abcd.abcd", [-1, -1, 1, 2]),  # said again further on, in longer runs
        ("abba", "xyz", [-1] * 4),
        ("", "ab", []),
        ("ab", "", [-1, -1]),
    ],
)
def test_equal_tokens_behind_equal_text_are_counterparts(target: str, completion: str, places: list[int]) -> None:
    found = places_in_completion([ord(one) for one in target], [ord(one) for one in completion], _Letters())
    assert found == places


def test_what_is_said_twice_is_told_apart() -> None:
    once, twice = [ord(one) for one in "so."], [ord(one) for one in "so.so."]
    assert places_in_completion(twice, [*twice, *once], _Letters()) == [0, 1, 2, 3, 4, 5]
    assert places_in_completion([9, *twice], [*twice], _Letters()) == [-1, 0, 1, 2, 3, 4, 5]


def test_a_leading_space_costs_the_first_token_alone() -> None:
    """GPT-2's tokens hold the space in front; a rationale loses it where the completion begins."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    made.train_from_iterator(["Ann pays more. So Ann pays"] * 9, trainers.BpeTrainer(show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    ids, completion = _ids(tokenizer, "Ann pays more."), _ids(tokenizer, " Ann pays more. So Ann")
    assert tokenizer.convert_ids_to_tokens([ids[0], completion[0]]) == ["Ann", "ĠAnn"]
    assert places_in_completion(ids, completion, tokenizer) == [-1, *range(1, len(ids))]
