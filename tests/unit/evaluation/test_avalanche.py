"""The error avalanche, beside counts made by hand, and the texts of several models as one beside those of each."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from distill_llm.evaluation.avalanche import Link, in_words, measure_avalanche, to_avalanche_markdown
from distill_llm.evaluation.joint import JointGenerator
from distill_llm.models.generate import Generator
from distill_llm.teachers.ensemble import mixed

if TYPE_CHECKING:
    from collections.abc import Callable

    from distill_llm.models.load import LoadedModel

T, F = True, False
CHAIN = [
    ("big", [T, T, T, F, T, F]),
    ("middle", [T, T, F, F, T, T]),
    ("student", [T, F, F, F, F, T]),
]
MEAN = ("models above", [T, T, F, F, F, T])


def test_inherited_lost_and_gained_are_counted() -> None:
    """The student misses 1, 2, 3 and 4. Of these the teacher missed 3, the assistant 2 and 3; 1 and 4 are its own."""
    avalanche = measure_avalanche(CHAIN)
    assert avalanche.links == (
        Link(name="big", wrong=2, inherited=1, lost=None, gained=None),
        Link(name="middle", wrong=2, inherited=2, lost=1, gained=1),
        Link(name="student", wrong=4, inherited=4, lost=2, gained=0),
    )
    assert (avalanche.own, avalanche.num_examples) == (2, 6)


def test_a_mean_stands_beside_the_chain() -> None:
    avalanche = measure_avalanche(CHAIN, [MEAN])
    assert [link.name for link in avalanche.links] == ["big", "middle", "models above", "student"]
    assert avalanche.links[2] == Link(name="models above", wrong=3, inherited=3, lost=None, gained=None)
    assert avalanche.links[3].lost == 2, "against the assistant, and not the mean"
    assert avalanche.own == 1


def test_the_table_says_it_in_shares() -> None:
    text = to_avalanche_markdown(measure_avalanche(CHAIN, [MEAN]))
    assert "| error avalanche | wrong | of 4 wrong in student | lost | gained |" in text
    assert "| big | 2 | 1 (25.0%) | - | - |" in text
    assert "| **student** | 4 | - | 2 | 0 |" in text
    assert "Of the 4 wrong answers of 'student', 1 (25.0%) were right in every model above it." in text


def test_a_student_without_a_wrong_answer() -> None:
    avalanche = measure_avalanche([("big", [F, T]), ("student", [T, T])])
    assert in_words(avalanche) == "'student' has no wrong answer."
    assert "| big | 1 | 0 | - | - |" in to_avalanche_markdown(avalanche)


PROMPTS = [[5, 6, 7], [8, 9], [5, 6, 8], [10, 11, 12, 13]]
MIX: Any = partial(mixed, weights=(1.0, 1.0), mean="probabilities", by="fixed")


def test_twice_the_same_model_writes_what_it_writes_alone(tiny_model: Callable[..., LoadedModel]) -> None:
    one = tiny_model(seed=3)
    alone = Generator(one.model, one.tokenizer, max_new_tokens=6).write_ids(PROMPTS)
    joint = JointGenerator([one.model, one.model], one.tokenizer, MIX, max_new_tokens=6)
    assert [text.text for text in joint.write_ids(PROMPTS)] == [text.text for text in alone]


def test_the_likeliest_word_of_the_mean_is_written(tiny_llama: Callable[..., LoadedModel]) -> None:
    first, second = tiny_llama(seed=3), tiny_llama(seed=4)
    with torch.no_grad():
        for one in (first, second):
            one.model.lm_head.weight.mul_(20)  # sure of something, so that their mean is not that of their logits
        said = [
            one.model(input_ids=torch.tensor(PROMPTS[:1])).logits[0, -1].double().softmax(-1) for one in (first, second)
        ]
    expected = int((said[0] + said[1]).argmax())
    joint = JointGenerator([first.model, second.model], first.tokenizer, MIX, max_new_tokens=1)
    assert joint.write_ids(PROMPTS[:1])[0].text == first.tokenizer.decode([expected])


@pytest.mark.parametrize("prefix", [(), (5, 6)])
def test_an_encoder_decoder_may_begin_with_a_prefix(
    tiny_t5: Callable[..., LoadedModel], prefix: tuple[int, ...]
) -> None:
    one = tiny_t5(seed=2)
    options: Any = {"max_new_tokens": 4, "decoder_prefix": prefix}
    alone = Generator(one.model, one.tokenizer, **options).write_ids(PROMPTS)
    joint = JointGenerator([one.model, one.model], one.tokenizer, MIX, **options).write_ids(PROMPTS)
    assert [text.text for text in joint] == [text.text for text in alone]
