"""A head without its model makes the model's logits, also after a way over the disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from distill_llm.core.errors import ConfigError, StorageError
from distill_llm.models.head import OutputHead
from distill_llm.models.stored_head import load_head
from tests.golden.test_chunked_loss import MODELS, WORDS

if TYPE_CHECKING:
    from pathlib import Path


def _model(name: str) -> Any:
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = AutoConfig.for_model(**{"vocab_size": WORDS, **special, **MODELS[name]})
    if config.is_encoder_decoder:
        config.decoder_start_token_id = 0
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_config(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
        if "bart" in name or "marian" in name:
            model.final_logits_bias.normal_()
    return model


@pytest.mark.parametrize("name", MODELS)
def test_it_makes_the_models_own_logits(name: str, tmp_path: Path) -> None:
    model = _model(name)
    caught = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    ids = torch.tensor([[5, 6, 7, 1]])
    with torch.no_grad():
        logits = model(input_ids=ids, **({"labels": ids} if model.config.is_encoder_decoder else {})).logits
    OutputHead(model, width=40).stored().save(tmp_path / "head.safetensors")
    head = load_head(tmp_path / "head.safetensors", "cpu")
    torch.testing.assert_close(head(caught[0]), logits[..., :40])
    assert head.weight.shape[0] == 40


def test_a_head_with_adapters_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    student = get_peft_model(_model("llama"), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ConfigError, match=r"its output head is a .*, and only a plain linear layer.*top_k"):
        OutputHead(student).stored()


def test_a_torn_file_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "head.safetensors").write_bytes(b"torn")
    with pytest.raises(StorageError, match=r"head cannot be read .*Delete the file and type: distill-llm cache"):
        load_head(tmp_path / "head.safetensors", "cpu")
