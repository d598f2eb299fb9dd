"""Sizes between two configs: equal ratios, rounded to what a model can have."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BartConfig, GPT2Config, LlamaConfig, T5Config

from distill_llm.models.sizes import sizes_between

T5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
CASES: list[tuple[Any, dict[str, Any]]] = [
    (T5Config(d_model=512, d_kv=64, d_ff=2048, num_layers=8, num_heads=8, vocab_size=99), T5),
    (
        LlamaConfig(
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=12,
            num_attention_heads=16,
            num_key_value_heads=8,
            vocab_size=99,
        ),
        {
            "model_type": "llama",
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
        },
    ),
    (
        GPT2Config(n_embd=256, n_layer=8, n_head=8, vocab_size=99),
        {"model_type": "gpt2", "n_embd": 40, "n_layer": 1, "n_head": 5},
    ),
    (
        BartConfig(
            d_model=128, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8, decoder_attention_heads=8
        ),
        {
            "model_type": "bart",
            "d_model": 24,
            "encoder_layers": 2,
            "decoder_layers": 1,
            "encoder_attention_heads": 3,
            "decoder_attention_heads": 3,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
        },
    ),
]


@pytest.mark.parametrize(("teacher", "student"), CASES, ids=lambda case: getattr(case, "model_type", ""))
def test_models_between_can_be_built_and_shrink(teacher: Any, student: dict[str, Any]) -> None:
    def built(config: Any) -> Any:
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return auto.from_config(config).eval()

    kind = type(teacher)
    between = [kind(**{**student, **sizes, "vocab_size": 99}) for sizes in sizes_between(teacher, student, 3)]
    models = [built(config) for config in (*between, kind(**{**student, "vocab_size": 99}))]
    counts = [sum(weight.numel() for weight in model.parameters()) for model in models]
    assert all(large > small for large, small in pairwise(counts)), counts
    ids = torch.tensor([[3, 4, 5]])
    for model in models:
        inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        assert model(input_ids=ids, **inputs).logits.shape == (1, 3, 99)


def test_ratios_are_equal() -> None:
    """Between 2048 and 48 lies sqrt(2048 * 48) = 313.5, between 512 and 32 lies 128, which 2 x 6 heads make 132."""
    (sizes,) = sizes_between(CASES[0][0], T5, 1)
    assert sizes == {"d_model": 132, "d_kv": 23, "d_ff": 314, "num_layers": 4, "num_decoder_layers": 4, "num_heads": 6}


def test_heads_of_their_own_width_stay_so() -> None:
    teacher = LlamaConfig(hidden_size=256, num_attention_heads=4, num_key_value_heads=4, head_dim=32, vocab_size=99)
    student = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    (sizes,) = sizes_between(teacher, student | {"head_dim": 8}, 1)
    assert sizes["hidden_size"] == 128
    assert sizes["head_dim"] == 16


@pytest.mark.parametrize(
    ("student", "said"),
    [
        ({"model_type": "llama"}, "the teacher is a t5 and the student a llama"),
        ({**T5, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 8, "num_heads": 8}, "have the same sizes"),
    ],
)
def test_where_nothing_lies_between(student: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sizes_between(CASES[0][0], student, 1)
