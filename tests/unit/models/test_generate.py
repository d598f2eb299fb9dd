"""The generation loop against one token at a time by hand: padding, stops, cuts, and random numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from distill_llm.models.generate import Generator, Written

if TYPE_CHECKING:
    from collections.abc import Callable

    from distill_llm.models.load import LoadedModel

TEXTS = ["who pays more ?", "a", "what costs 3 + 4 ? ann and bob", "b c d"]


def _generator(model: LoadedModel, **options: Any) -> Generator:
    return Generator(model.model, model.tokenizer, **({"max_new_tokens": 6} | options))


def _greedy(model: LoadedModel, ids: list[int], count: int) -> list[int]:
    """The likeliest token, again and again, without transformers' generate and without padding."""
    written: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            if model.is_encoder_decoder:
                decoder = torch.tensor([[0, *written]])
                logits = model.model(input_ids=torch.tensor([ids]), decoder_input_ids=decoder).logits
            else:
                logits = model.model(input_ids=torch.tensor([[*ids, *written]])).logits
            written.append(int(logits[0, -1].argmax()))
            if written[-1] == model.tokenizer.eos_token_id:
                break
    return written


def test_a_batch_is_written_as_each_text_alone_by_hand(tiny_model: Callable[..., LoadedModel]) -> None:
    """Texts of 1 to 8 tokens: a decoder is padded on the left, an encoder on the right."""
    model = tiny_model(seed=4)
    batch = _generator(model).write(TEXTS)
    outputs = set()
    for text, one in zip(TEXTS, batch, strict=True):
        ids = model.tokenizer(text)["input_ids"]
        expected = _greedy(model, ids, 6)
        assert one.tokens_in == len(ids)
        assert one.tokens_out == len([token for token in expected if token > 1])
        assert one.text == model.tokenizer.decode(expected, skip_special_tokens=True).strip()
        outputs.add(one.text)
    assert len(outputs) > 1, "texts that all end alike would prove little"
    assert batch == [_generator(model).write([text])[0] for text in TEXTS]


def test_ids_that_are_there_are_continued_as_they_are(tiny_llama: Callable[..., LoadedModel]) -> None:
    model = tiny_llama(seed=4)
    ids = [model.tokenizer(text)["input_ids"] for text in TEXTS]
    assert _generator(model).write_ids(ids) == _generator(model).write(TEXTS)


def test_of_a_text_that_is_too_long_the_end_stays(tiny_llama: Callable[..., LoadedModel]) -> None:
    model = tiny_llama(seed=4)
    (cut,) = _generator(model, max_input_tokens=3).write(["a b c d e f g"])
    assert cut == _generator(model).write(["e f g"])[0]
    assert cut.tokens_in == 3
    assert _generator(model, max_input_tokens=3).lengths(["a b c d e", "a"]) == [3, 1]


def test_a_stop_text_ends_the_writing_and_is_left_out(tiny_llama: Callable[..., LoadedModel]) -> None:
    model = tiny_llama(seed=4, tokenizer="bytes_bpe")
    (whole,) = _generator(model, max_new_tokens=12).write(["who pays more ?"])
    stop = whole.text[len(whole.text) // 2 :][:2]
    (stopped,) = _generator(model, max_new_tokens=12, stop=(stop,)).write(["who pays more ?"])
    assert stopped.text == whole.text.split(stop)[0].strip()
    assert stopped.tokens_out < whole.tokens_out


def test_the_end_of_sequence_ends_the_writing(tiny_t5: Callable[..., LoadedModel]) -> None:
    """Rows that ended go on as padding, which is neither shown nor counted."""
    model = tiny_t5(seed=4)
    generator = _generator(model)
    pays = model.tokenizer("ann pays")["input_ids"]
    assert generator._read([*pays, 1, 0, 0], 5) == Written("ann pays", 5, 2)
    assert generator._read([1, 0], 5) == Written("", 5, 0)
    assert generator._read([0, 0], 5) == Written("", 5, 0)
    assert generator._read(pays, 5) == Written("ann pays", 5, 2)


def test_sampling_follows_its_seed(tiny_model: Callable[..., LoadedModel]) -> None:
    model = tiny_model(seed=4)

    def sampled(seed: int) -> list[list[str]]:
        generator = _generator(model, temperature=1.0, seed=seed, max_new_tokens=10)
        return [[one.text for one in generator.write(TEXTS)] for _ in range(2)]

    first = sampled(1)
    torch.manual_seed(123)
    assert sampled(1) == first, "the global state does not matter"
    assert sampled(2) != first
    assert first[0] != first[1], "the next batch draws anew"


def test_samples_of_one_text_in_one_batch_differ(tiny_model: Callable[..., LoadedModel]) -> None:
    written = _generator(tiny_model(seed=4), temperature=1.0, max_new_tokens=10).write(["who pays more ?"] * 6)
    assert len({one.text for one in written}) == 6


def test_a_low_top_p_is_greedy(tiny_llama: Callable[..., LoadedModel]) -> None:
    model = tiny_llama(seed=4)
    assert _generator(model, temperature=1.0, top_p=1e-6).write(TEXTS) == _generator(model).write(TEXTS)


def test_the_models_mode_is_given_back_and_dropout_is_off(tiny_t5: Callable[..., LoadedModel]) -> None:
    """Validation runs in the middle of a training."""
    model = tiny_t5(seed=4, dropout_rate=0.5)
    model.model.train()
    first = _generator(model).write(TEXTS)
    assert model.model.training
    assert _generator(model).write(TEXTS) == first
    model.model.eval()
    assert _generator(model).write(TEXTS) == first
    assert not model.model.training
