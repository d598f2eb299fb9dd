"""Rounded weights against a formula, converted models against rounded ones, and folders that transformers loads."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BartConfig, GPT2Config, T5Config

from distill_llm.core.errors import ConfigError
from distill_llm.models.folder import weight_bytes
from distill_llm.models.load import build_student, check_bits, count_parameters, load_model, load_on
from distill_llm.models.quantize import (
    QuantizeSpec,
    as_quantized,
    fake,
    is_prepared,
    is_quantized,
    prepared,
    quantized,
    quantized_bytes,
    save_quantized,
)
from distill_llm.models.spec import StudentSpec
from distill_llm.models.stored_head import take_head

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from distill_llm.models.load import LoadedModel

ROW_INT8: dict[str, Any] = {"weights": "int8", "activations": "full", "group_size": "row"}
T5_SIZES: dict[str, Any] = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0}
SPECS: list[dict[str, Any]] = [
    {"group_size": 8},
    {"weights": "int4", "activations": "full", "group_size": 16},
    ROW_INT8,
    {"weights": "int8", "activations": "int8", "group_size": "row"},
    {"group_size": 4, "embeddings": "int8"},
]


def _spec(**keys: Any) -> QuantizeSpec:
    return QuantizeSpec.model_validate({"group_size": 8} | keys)


def _said(model: Any) -> Tensor:
    ids = torch.arange(2, 12)[None]
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    with torch.no_grad():
        return model.eval()(**inputs).logits


def _rounded(weight: Tensor, group: int, top: int) -> Tensor:
    """Symmetric: the largest of a group, of either sign, is ``top`` + 1/2 steps from zero."""
    groups = weight.double().reshape(len(weight), -1, group)
    step = groups.abs().amax(-1, keepdim=True) / (top + 0.5)
    return ((groups / step).round().clamp(-top - 1, top) * step).reshape(weight.shape)


def _sign_of_largest(weight: Tensor, group: int) -> Tensor:
    """A negative largest weight lies between two steps, where float32's last bit decides; a positive one is cut."""
    groups = weight.detach().reshape(len(weight), -1, group)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    return largest.sign().expand_as(groups).reshape(weight.shape)


def _rounded_tokens(states: Tensor) -> Tensor:
    """Asymmetric, each token by itself: 255 steps from its smallest number (or 0) to its largest (or 0)."""
    states = states.double()
    low, high = states.amin(-1, keepdim=True).clamp_max(0), states.amax(-1, keepdim=True).clamp_min(0)
    step = (high - low) / 255
    zero = (-128 - low / step).round().clamp(-128, 127)
    return (((states / step).round() + zero).clamp(-128, 127) - zero) * step


@pytest.mark.parametrize(
    ("spec", "group", "top"),
    [
        (_spec(group_size=4), 4, 7),
        (_spec(group_size=16, activations="full"), 16, 7),
        (_spec(group_size="row"), 32, 7),
        (_spec(weights="int8", activations="full", group_size="row"), 32, 127),
        (_spec(weights="int8", group_size=8), 8, 127),
    ],
)
def test_a_layer_computes_with_what_the_formula_rounds(
    spec: QuantizeSpec, group: int, top: int, tiny_llama: Callable[..., LoadedModel]
) -> None:
    model = tiny_llama().model
    layer = model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        layer.weight.mul_(_sign_of_largest(layer.weight, group))
    weight = layer.weight.detach().clone()
    states = torch.randn(2, 5, 32) + 0.5
    prepared(model, spec)
    layer = model.model.layers[0].mlp.down_proj
    read = _rounded_tokens(states) if spec.activations == "int8" else states.double()
    expected = read @ _rounded(weight, group, top).T
    torch.testing.assert_close(layer(states).double(), expected, atol=2e-7, rtol=1e-5)
    assert (expected - states.double() @ weight.double().T).abs().max() > 1e-5, "rounding is felt"
    fake(model, False)
    torch.testing.assert_close(layer(states), nn.functional.linear(states, weight), atol=0, rtol=0)
    with as_quantized(model):
        torch.testing.assert_close(layer(states).double(), expected, atol=2e-7, rtol=1e-5)
    torch.testing.assert_close(layer(states), nn.functional.linear(states, weight), atol=0, rtol=0)


def test_the_gradient_goes_through_the_rounding(tiny_llama: Callable[..., LoadedModel]) -> None:
    """To the weights, as if they were the rounded ones; of those that are clipped less, for the scale hangs on them."""
    model = tiny_llama().model
    states, outer = torch.randn(3, 32), torch.randn(3, 16)
    prepared(model, _spec(activations="full"))
    layer = model.model.layers[0].mlp.down_proj
    layer(states).backward(outer)
    groups = layer.weight.detach().reshape(-1, 8).abs()
    inner = (groups < groups.amax(-1, keepdim=True)).reshape(layer.weight.shape)
    torch.testing.assert_close(layer.weight.grad[inner], (outer.T @ states)[inner])


def _t5_untied(seed: int = 0, **sizes: Any) -> Any:
    """As T5 1.1 has it."""
    torch.manual_seed(seed)
    config = T5Config(vocab_size=32, tie_word_embeddings=False, decoder_start_token_id=0, **(T5_SIZES | sizes))
    return AutoModelForSeq2SeqLM.from_config(config)


@pytest.mark.parametrize("keys", SPECS)
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("t5", {"feed_forward_proj": "relu"}),
        ("t5_untied", {"feed_forward_proj": "gated-gelu"}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False}),
    ],
)
def test_rounded_converted_and_loaded_say_the_same_to_the_bit(
    keys: dict[str, Any], family: str, sizes: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    build, spec = request.getfixturevalue(f"tiny_{family.removesuffix('_untied')}"), _spec(**keys)
    make = _t5_untied if family == "t5_untied" else lambda **options: build(**options).model
    names = list(make(**sizes).state_dict())
    full, rounded, afterwards = (make(seed=3, **sizes) for _ in range(3))
    prepared(rounded, spec)
    assert is_prepared(rounded)
    assert list(rounded.state_dict()) == names, "checkpoints do not notice"
    said = _said(rounded)
    assert (said - _said(full)).abs().max() > 1e-4
    torch.testing.assert_close(_said(quantized(afterwards, spec)), said, atol=0, rtol=0)
    torch.testing.assert_close(_said(quantized(rounded, spec)), said, atol=0, rtol=0)
    save_quantized(rounded, tmp_path)
    auto: Any = AutoModelForSeq2SeqLM if family.startswith("t5") else AutoModelForCausalLM
    plain, ours = auto.from_pretrained(tmp_path), load_model(str(tmp_path), where="test")
    for loaded in (plain, ours):
        torch.testing.assert_close(_said(loaded), said, atol=0, rtol=0)
        number = sum(weight.numel() for weight in full.parameters())
        assert sum(weight.numel() for weight in loaded.parameters()) == number
    assert count_parameters(str(tmp_path), where="test") == number
    head = (tmp_path / "model.safetensors").read_bytes()[:8]
    stored = (weight_bytes(str(tmp_path)) or 0) - 8 - int.from_bytes(head, "little")
    assert stored == quantized_bytes(full, spec, where="test"), "the file's own head of names comes on top"


def test_computing_in_another_type_and_on_a_device(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    model = quantized(tiny_t5().model, _spec(embeddings="int8"))
    said = _said(model)
    save_quantized(model, tmp_path)
    short = load_on("cpu", str(tmp_path), "main", where="test", dtype="bfloat16")
    assert short.dtype == torch.bfloat16
    assert (_said(short).float() - said).abs().max() < 0.1 * said.abs().max()
    assert sum(weight.numel() for weight in short.parameters()) == sum(one.numel() for one in model.parameters())


def test_a_name_without_a_dot_and_layers_by_name(tmp_path: Path) -> None:
    """BART has a bias `final_logits_bias` beside its layers; its embeddings scale what they give."""
    sizes = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 16}
    layers = {f"{side}_{what}": number for side in ("encoder", "decoder") for what, number in SIDE.items()}
    model: Any = AutoModelForSeq2SeqLM.from_config(BartConfig(vocab_size=32, **sizes, **layers))
    with pytest.raises(ConfigError, match=r"x\.embeddings: .* no plain matrix \(model\.shared"):
        quantized(model, _spec(embeddings="int8"), where="x")
    said = _said(quantized(model, _spec(modules=["fc1", "self_attn.q_proj"])))
    save_quantized(model, tmp_path)
    loaded = load_model(str(tmp_path), where="test")
    torch.testing.assert_close(_said(loaded), said, atol=0, rtol=0)
    found = {name for name, weight in loaded.named_parameters() if type(weight) is not nn.Parameter}
    assert {name.split(".", 4)[-1] for name in found} == {"fc1.weight", "self_attn.q_proj.weight"}
    left = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert "model.encoder.layers.0.fc2" in left
    assert "model.encoder.layers.0.fc1" not in left


SIDE = {"layers": 1, "attention_heads": 4}


@pytest.mark.parametrize(
    ("keys", "sizes", "match"),
    [
        (
            {"group_size": 32},
            {},
            r"x\.group_size: 32 does not divide the width of \d+ layers, such as 16 of .*Expected 16,",
        ),
        ({"modules": ["wq"]}, {}, r"x\.modules: no linear layer's name ends with \['wq'\].*'q'"),
        ({"modules": []}, {}, r"x\.modules: no linear layer's name ends with"),
        ({"head": True}, {}, r"x\.head: the output head is the matrix of the embeddings"),
    ],
)
def test_what_cannot_be_quantized_is_refused(
    keys: dict[str, Any], sizes: dict[str, Any], match: str, tiny_t5: Callable[..., LoadedModel]
) -> None:
    with pytest.raises(ConfigError, match=match):
        prepared(tiny_t5(**sizes).model, _spec(**keys), where="x")


def test_a_model_without_linear_layers_is_refused() -> None:
    model: Any = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ConfigError, match="GPT2LMHeadModel has no linear layer"):
        prepared(model, _spec())


def test_a_group_of_one_is_no_group() -> None:
    with pytest.raises(ValidationError):
        QuantizeSpec.model_validate({"group_size": 1})


def test_quantized_weights_are_no_student_and_no_base_of_other_bits(
    tiny_llama: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    student = tiny_llama(tie_word_embeddings=False)
    save_quantized(quantized(student.model, _spec(head=True)), tmp_path)
    spec = StudentSpec.model_validate({"model": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"student\.model: the weights of this model are quantized"):
        build_student(spec, student.tokenizer)
    with pytest.raises(ConfigError, match="quantized already"):
        check_bits(str(tmp_path), "4bit", where="x")
    with pytest.raises(ConfigError, match="x: its output head is a Linear"):
        take_head(load_model(str(tmp_path), where="test"), 8, where="x")
    assert is_quantized(student.model.config)


def test_without_torchao_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("distill_llm.core.extras.is_there", lambda package: package != "torchao")
    with pytest.raises(ConfigError, match=r"x: .*'torchao'.*pip install 'distill-llm\[quantize\]'"):
        prepared(None, _spec(), where="x")


def test_a_recipe_s_section_loads_without_torch() -> None:
    code = "import sys, distill_llm.models.quantize; assert not {'torch', 'torchao'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
