"""Adapters in their variants, and below them a base of fewer bits: gradients, saving, merging."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from distill_llm.models.load import LoadedModel, build_student, check_student, load_model
from distill_llm.models.lora import add_lora, save_bits
from distill_llm.models.spec import LoraSpec, StudentSpec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def base(tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> str:
    model = tiny_model(seed=3)
    model.model.save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def _logits(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **more).logits


def _student(tiny_model: Callable[..., LoadedModel], base: str, **options: Any) -> Any:
    spec = StudentSpec.model_validate({"model": base, "lora": {"rank": 4, "alpha": 8}} | options)
    torch.manual_seed(5)
    model = build_student(spec, tiny_model(seed=3).tokenizer).model
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


@pytest.mark.parametrize("variant", [{"dora": True}, {"rank_stabilized": True}, {"modules": "by_architecture"}])
def test_variants_learn_and_are_merged_into_a_model_that_says_the_same(
    variant: dict[str, Any], tiny_model: Callable[..., LoadedModel], base: str, tmp_path: Path
) -> None:
    student = _student(tiny_model, base, lora={"rank": 4, "alpha": 8} | variant)
    plain = _student(tiny_model, base)
    said = _logits(student)
    assert (said - _logits(plain)).abs().max() > 1e-3, "a variant that changes nothing"
    said.square().sum().backward()
    learned = {name for name, weight in student.named_parameters() if weight.grad is not None}
    assert any("lora_magnitude" in name for name in learned) == variant.get("dora", False)
    student.save_pretrained(tmp_path / "adapter")
    loaded = load_model(str(tmp_path / "adapter"), where="x")
    torch.testing.assert_close(_logits(loaded), said, atol=1e-4, rtol=1e-4)


def test_rank_stabilized_adapters_are_scaled_by_the_root_of_the_rank(
    tiny_model: Callable[..., LoadedModel], base: str
) -> None:
    for stabilized, scale in [(False, 8 / 16), (True, 8 / 4)]:
        model = load_model(base, where="x")
        adapted = add_lora(model, LoraSpec(rank=16, alpha=8, rank_stabilized=stabilized))
        scales = {module.scaling["default"] for module in adapted.modules() if hasattr(module, "lora_A")}
        assert scales == {scale}


@pytest.mark.parametrize(("load_in", "apart"), [("4bit", 2e-4), ("8bit", 0.05)])
def test_a_base_of_fewer_bits_is_saved_and_merged_as_it_was_learned_on(
    load_in: str, apart: float, tiny_model: Callable[..., LoadedModel], base: str, tmp_path: Path
) -> None:
    """int8 rounds activations too while it is trained, so that the merged model is only near."""
    pytest.importorskip("bitsandbytes")
    student = _student(tiny_model, base, load_in=load_in)
    kinds = {type(weight).__name__ for weight in student.parameters()}
    assert {"4bit": "Params4bit", "8bit": "Int8Params"}[load_in] in kinds
    full = _student(tiny_model, base)
    assert LoadedModel(student, None).num_parameters == LoadedModel(full, None).num_parameters
    said = _logits(student)
    student.save_pretrained(tmp_path / "adapter")
    save_bits(student, tmp_path / "adapter")
    loaded = load_model(str(tmp_path / "adapter"), where="x")
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    gap = (_logits(loaded) - said).abs().max()
    assert gap < apart * said.abs().max()
    if load_in == "4bit":
        assert 20 * gap < (_logits(full) - said).abs().max(), "the base in full says something else"


def test_a_4bit_student_learns_after_a_validation_as_before_it(
    tiny_model: Callable[..., LoadedModel], base: str
) -> None:
    """bitsandbytes lays weights out anew in a pass without gradients on some CPUs, and loses later gradients."""
    pytest.importorskip("bitsandbytes")

    def gradients(validates: bool) -> dict[str, torch.Tensor]:
        student = _student(tiny_model, base, load_in="4bit")
        if validates:
            with torch.no_grad():
                _logits(student.eval())
        _logits(student.train()).square().sum().backward()
        return {name: weight.grad for name, weight in student.named_parameters() if weight.grad is not None}

    straight, after = gradients(False), gradients(True)
    assert straight.keys() == after.keys()
    assert all(bool(gradient.abs().sum() > 0) for gradient in straight.values())
    torch.testing.assert_close(after, straight)


def test_fewer_bits_without_adapters_are_refused(base: str) -> None:
    with pytest.raises(ValueError, match=r"nothing would be trained\. Add `lora"):
        StudentSpec(model=base, load_in="4bit")


def test_missing_bitsandbytes_is_named_before_anything_is_loaded(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from distill_llm.core.errors import ConfigError

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else real(name, *a)
    )
    with pytest.raises(ConfigError, match=r"student \(load_in: 4bit\).*distill-llm\[quantize\]"):
        check_student(StudentSpec(model=base, load_in="4bit", lora=LoraSpec()))
