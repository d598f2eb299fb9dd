"""Options of a student: a prefix that the decoder reads, as plain transformers shows it, and its attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from distill_llm.core.errors import ConfigError
from distill_llm.core.signals import model_inputs
from distill_llm.data.collate import Collator
from distill_llm.data.rows import Row
from distill_llm.models.attention import set_attention
from distill_llm.models.generate import Generator
from distill_llm.models.load import build_student, check_student
from distill_llm.models.spec import StudentSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from distill_llm.models.load import LoadedModel

PREFIX = [9, 10]
PROMPTS = [[5, 6, 7, 8], [6, 5]]


@pytest.mark.parametrize("stop", [(), ("pays",)])
def test_generation_starts_behind_the_prefix_and_says_only_what_follows(
    stop: tuple[str, ...], tiny_t5: Callable[..., LoadedModel]
) -> None:
    """Against plain ``generate`` with ``decoder_input_ids``, as the documentation shows it."""
    student = tiny_t5(seed=3)
    model = student.model.eval()
    generator = Generator(model, student.tokenizer, max_new_tokens=5, decoder_prefix=PREFIX, stop=stop)
    written = generator.write_ids(PROMPTS)
    begin = [[model.config.decoder_start_token_id, *PREFIX]]
    for prompt, one in zip(PROMPTS, written, strict=True):
        plain = model.generate(
            input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor(begin), max_new_tokens=5, do_sample=False
        )[0, len(begin[0]) :].tolist()
        if not stop:
            assert list(one.ids) == [token for token in plain if token not in (0, 1)]
        assert list(one.ids) == plain[: len(one.ids)]
    without = Generator(model, student.tokenizer, max_new_tokens=5).write_ids(PROMPTS)
    assert [one.ids for one in without] != [one.ids for one in written], "the prefix is read"


def test_an_end_in_the_prefix_does_not_end_the_text(tiny_t5: Callable[..., LoadedModel]) -> None:
    student = tiny_t5(seed=3)
    ends = [student.tokenizer.eos_token_id, student.tokenizer.pad_token_id]
    generator = Generator(student.model, student.tokenizer, max_new_tokens=4, decoder_prefix=[9, *ends])
    assert any(one.tokens_out for one in generator.write_ids(PROMPTS))


def test_training_sees_the_tokens_that_generation_starts_with(tiny_t5: Callable[..., LoadedModel]) -> None:
    """The first supervised token is predicted where the first generated one is."""
    student = tiny_t5(seed=3)
    model = student.model.eval()
    batch = Collator(0, model.config.decoder_start_token_id)([Row(0, "label", PROMPTS[0], [7, 1], prefix_ids=PREFIX)])
    logits = model(**model_inputs(batch)).logits[0]
    first = (batch["labels"][0] != -100).int().argmax()
    out = model.generate(
        input_ids=torch.tensor([PROMPTS[0]]),
        decoder_input_ids=torch.tensor([[model.config.decoder_start_token_id, *PREFIX]]),
        max_new_tokens=1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    torch.testing.assert_close(out.logits[0][0], logits[first], rtol=1e-4, atol=1e-5)


def test_attention_is_as_the_recipe_says(tiny_llama: Callable[..., LoadedModel]) -> None:
    tokenizer = tiny_llama().tokenizer
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    asked = {"config": {"model_type": "llama", **sizes}, "tokenizer": {"kind": "words"}}
    for attention in ("eager", "sdpa"):
        spec = StudentSpec.model_validate(asked | {"attention": attention})
        assert build_student(spec, tokenizer).model.config._attn_implementation == attention
    spec = StudentSpec.model_validate(asked | {"attention": "flash_attention_3"})
    with pytest.raises(ConfigError, match=r"student\.attention: LlamaForCausalLM cannot have 'flash_attention_3' here"):
        build_student(spec, tokenizer)


def test_the_stacks_of_a_model_get_its_attention(
    tiny_t5: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where transformers sets that of the model's own config alone, of which a T5's stacks have copies."""
    from transformers import PreTrainedModel

    def alone(part: Any, name: str) -> None:
        part.config._attn_implementation_internal = name

    monkeypatch.setattr(PreTrainedModel, "set_attn_implementation", alone)
    model = tiny_t5().model
    before = model.config._attn_implementation
    name = "eager" if before != "eager" else "sdpa"
    set_attention(model, name)
    assert [part.config._attn_implementation for part in (model, model.encoder, model.decoder)] == [name] * 3


def test_flex_attention_computes_in_what_autocast_says(
    tiny_llama: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotated queries and keys are float32 there, values are not: the kernel gets all three in one precision."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen = []

    def attend(module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        seen.append((query.dtype, key.dtype, value.dtype))
        return value.repeat_interleave(query.size(1) // value.size(1), 1).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flex_attention", attend)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    asked = {"config": {"model_type": "llama", **sizes}, "tokenizer": {"kind": "words"}, "attention": "flex_attention"}
    model = build_student(StudentSpec.model_validate(asked), tiny_llama().tokenizer).model
    build_student(StudentSpec.model_validate(asked), tiny_llama().tokenizer)
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(input_ids=torch.tensor([PROMPTS[0]]), use_cache=False)
    assert seen == [(torch.bfloat16,) * 3, (torch.float32,) * 3], "each once, however many students were built"


def test_flex_attention_with_dropout_is_refused(tiny_llama: Callable[..., LoadedModel]) -> None:
    """Before the first step, where transformers would stop."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "llama", **sizes, "attention_dropout": 0.1}
    asked = {"config": config, "tokenizer": {"kind": "words"}, "attention": "flex_attention"}
    with pytest.raises(ConfigError, match=r"student\.attention: flex_attention knows no dropout.* 0\.1"):
        build_student(StudentSpec.model_validate(asked), tiny_llama().tokenizer)


def test_a_decoder_only_student_has_one_side() -> None:
    spec = StudentSpec.model_validate(
        {"config": {"model_type": "llama"}, "tokenizer": {"kind": "words"}, "prefix_side": "decoder"}
    )
    with pytest.raises(ConfigError, match=r"student\.prefix_side: 'decoder' needs an encoder-decoder"):
        check_student(spec)
    check_student(spec.model_copy(update={"config": {"model_type": "t5"}}))
    with pytest.raises(ValueError, match="`chat` for decoder-only ones"):
        StudentSpec.model_validate({"model": "x", "prefix_side": "decoder", "chat": True})
