"""A model cut to fewer of its decoder's layers: what an exit says, it says, and so does the folder that is saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from distill_llm.core.errors import ConfigError
from distill_llm.core.features import Reading
from distill_llm.models.exits import Exits, cut_to, decoder_depth, save_merged
from distill_llm.models.forward import forward
from distill_llm.models.head import OutputHead
from distill_llm.models.layers import add_heads
from distill_llm.models.load import load_model
from distill_llm.models.lora import add_lora
from distill_llm.models.spec import LoraSpec

if TYPE_CHECKING:
    from pathlib import Path

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
SMALL: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4},
    "t5 v1.1": {
        "model_type": "t5",
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 32,
        "num_layers": 3,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    "bart": {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 3,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
    },
    "llama": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, **HEADS},
    "qwen2": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, **HEADS},
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64},
}


def _build(name: str) -> Any:
    sizes = {"model_type": name} | SMALL[name]
    config = AutoConfig.for_model(
        sizes.pop("model_type"), vocab_size=40, pad_token_id=0, bos_token_id=2, eos_token_id=1, **sizes
    )
    if config.is_encoder_decoder:
        config.decoder_start_token_id = 0
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(3)
    model = auto.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model.eval()


def _settings(model: Any) -> dict[str, Any]:
    """Without what transformers notes there when it saves."""
    return {key: value for key, value in model.config.to_dict().items() if key not in ("architectures", "dtype")}


def _batch(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return batch | ({"decoder_input_ids": ids + 4} if model.config.is_encoder_decoder else {})


def _at_exit(model: Any, layers: int) -> torch.Tensor:
    hidden = forward(model, _batch(model), Reading(hidden=frozenset({"decoder"}))).hidden("decoder")
    flat = hidden[layers].flatten(0, 1)
    return OutputHead(model).logits(Exits(model).read(flat)).view(*hidden[layers].shape[:2], -1)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_an_exit_says_what_the_folder_says_that_is_saved_of_it(name: str, tmp_path: Path) -> None:
    model = _build(name)
    assert decoder_depth(model.config) == 3
    whole = model(**_batch(model)).logits
    said = {layers: _at_exit(model, layers) for layers in (1, 2)}
    assert (said[1] - said[2]).abs().max() > 1e-2
    assert (said[2] - whole).abs().max() > 1e-2
    Exits(model).check(model, (1, 2))
    before = _settings(model)
    for layers in (1, 2):
        with cut_to(model, layers):
            assert decoder_depth(model.config) == layers
            save_merged(model, tmp_path / str(layers))
        loaded = load_model(str(tmp_path / str(layers)), where="test").eval()
        assert decoder_depth(loaded.config) == layers
        torch.testing.assert_close(loaded(**_batch(model)).logits, said[layers], atol=1e-5, rtol=1e-5)
        written = loaded.generate(**_batch(model), max_new_tokens=3, do_sample=False)
        with cut_to(model, layers):
            assert torch.equal(model.generate(**_batch(model), max_new_tokens=3, do_sample=False), written)
    assert _settings(model) == before
    torch.testing.assert_close(model(**_batch(model)).logits, whole, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["t5", "llama"])
@torch.no_grad()
def test_adapters_of_an_exit_are_merged(name: str, tmp_path: Path) -> None:
    """No base of that depth lies anywhere. Heads for hints stay out; the student goes on as it was."""
    model = add_lora(_build(name), LoraSpec(rank=2))
    for weight_name, weight in model.named_parameters():
        if "lora_B" in weight_name:
            weight.add_(torch.randn_like(weight))
    add_heads(model, {"hint": [(16, 8)]})
    said, before = _at_exit(model, 1), {key: value.clone() for key, value in model.state_dict().items()}
    with cut_to(model, 1):
        save_merged(model, tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    loaded = load_model(str(tmp_path), where="test").eval()
    assert not [key for key in loaded.state_dict() if "hint" in key or "lora" in key]
    torch.testing.assert_close(loaded(**_batch(model)).logits, said, atol=1e-5, rtol=1e-5)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_decoder_that_ends_in_an_unknown_way_is_refused() -> None:
    class Louder(nn.Module):
        def __init__(self, norm: nn.Module):
            super().__init__()
            self.norm = norm

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return self.norm(states)

    model = _build("llama")
    norm = model.model.norm
    model.model.norm = None
    model.model.last = Louder(norm)
    plain = model.model.forward

    def odd(*args: Any, **options: Any) -> Any:
        model.model.norm = model.model.last
        found = plain(*args, **options)
        model.model.norm = None
        return found

    model.model.forward = odd
    exits = Exits(model)
    with pytest.raises(ConfigError, match=r"scheme\.exits: LlamaForCausalLM does something .* not known"):
        exits.check(model, (1,))


def test_a_model_whose_layers_are_not_found_is_refused() -> None:
    model = _build("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(ConfigError, match="where LlamaForCausalLM has the 5 layers of its decoder is not known"):
        Exits(model)
