"""Formats that are read back by transformers: the same logits, or those of the numbers that were written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from distill_llm.core.errors import ConfigError
from distill_llm.export.base import Answering, chosen_formats, formats
from distill_llm.models.fresh import weightless
from distill_llm.models.generate import Generator
from tests.conftest import LLAMA_SIZES, build_tiny

if TYPE_CHECKING:
    from distill_llm.models.load import LoadedModel

IDS = torch.tensor([[5, 6, 7, 8, 9]])
ASKED = Answering(8, (), 1)
WIDE = LLAMA_SIZES | {"hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 1.0}


def _logits(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits.float()


def _written(name: str, student: LoadedModel, folder: Path) -> Any:
    """The model of a format, read back."""
    (one,) = chosen_formats([name])
    assert one.why_not(weightless(student.model.config), student.tokenizer) == ""
    one.write(student, folder)
    assert one.num_bytes(folder) > 0
    writer = one.open(folder, ASKED)
    assert isinstance(writer, Generator)
    return writer._model


def test_names() -> None:
    assert {"safetensors", "onnx", "onnx-int8", "openvino", "torchao-int4", "gguf"} <= set(formats())
    assert [one.name for one in chosen_formats(["safetensors", "safetensors"])] == ["safetensors"]
    with pytest.raises(ConfigError, match=r"'onx' is not one of .*Did you mean 'onnx'"):
        chosen_formats(["onx"])


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill_llm.core.extras.is_there", lambda package: package != "onnxscript")
    monkeypatch.setattr("distill_llm.export.base.is_there", lambda package: package != "onnxscript")
    with pytest.raises(ConfigError, match=r"--format onnx: .*'onnxscript'.*pip install 'distill-llm\[export\]'"):
        chosen_formats(["onnx"])
    assert not {"onnx", "onnx-int8"} & {one.name for one in chosen_formats(["all"])}


def test_safetensors_in_full_precision_are_the_student(tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    student = tiny_model()
    torch.testing.assert_close(
        _logits(_written("safetensors", student, tmp_path)), _logits(student.model), atol=0, rtol=0
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_the_student_s_weights_rounded(
    dtype: str, tiny_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    student = tiny_model()
    before = {name: weight.clone() for name, weight in student.model.state_dict().items()}
    read = _written(f"safetensors-{dtype}", student, tmp_path).state_dict()
    for name, weight in before.items():
        # Some of T5's are computed with in float32 all the same (transformers' `_keep_in_fp32_modules`).
        torch.testing.assert_close(read[name].float(), weight.to(getattr(torch, dtype)).float(), atol=0, rtol=0)
        torch.testing.assert_close(student.model.state_dict()[name], weight, atol=0, rtol=0)
    stored = load_file(tmp_path / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("bits", [8, 4])
def test_torchao_weights_are_rounded_to_their_bits(
    bits: int, tiny_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    pytest.importorskip("torchao", reason="needs the extra quantize")
    student = tiny_model()
    before = {name: weight.clone() for name, weight in student.model.named_parameters()}
    read = _written(f"torchao-int{bits}", student, tmp_path)
    for name, part in student.model.named_modules():
        if type(part) is not torch.nn.Linear or part is student.model.get_output_embeddings():
            continue
        weight, stored = part.weight.detach(), read.get_submodule(name).weight.dequantize().detach()
        groups = weight.reshape(-1, weight.size(1) if bits == 8 else 16)
        step = (2 * groups.abs().amax(1, keepdim=True) / (2**bits - 1)).expand_as(groups).reshape(weight.shape)
        assert ((weight - stored).abs() <= 0.51 * step * (2**bits - 1) / (2**bits - 2)).all(), name
        assert len(stored[0].unique()) <= 2**bits * max(1, weight.size(1) // 8)
    for name, weight in student.model.named_parameters():
        torch.testing.assert_close(weight, before[name], atol=0, rtol=0)  # the student is what it was


@pytest.mark.parametrize(
    "sizes",
    [WIDE, WIDE | {"tie_word_embeddings": True, "head_dim": 32}, WIDE | {"model_type": "qwen2"},
     WIDE | {"model_type": "qwen3", "head_dim": 128}],
    ids=["llama", "llama-tied", "qwen2", "qwen3"],
)  # fmt: skip
def test_gguf_is_the_student(sizes: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the extra export")
    student = build_tiny(sizes, tokenizer="bytes_bpe")
    for name, weight in student.model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    prompts = [student.tokenizer(text)["input_ids"] for text in (" who pays more ?", " 3 + 4 because ann", " a")]
    expected = Generator(student.model, student.tokenizer, max_new_tokens=8).write_ids(prompts)
    read = _written("gguf", student, tmp_path)
    torch.testing.assert_close(_logits(read), _logits(student.model), atol=0, rtol=0)
    assert chosen_formats(["gguf"])[0].open(tmp_path, ASKED).write_ids(prompts) == expected
    halved = tmp_path / "half"
    halved.mkdir()
    found = _written("gguf-float16", student, halved).state_dict()
    for name, weight in student.model.state_dict().items():
        kept = weight if weight.dim() == 1 else weight.half().float()
        torch.testing.assert_close(found[name], kept, atol=0, rtol=0)


def test_gguf_in_blocks_of_eight_bits(tmp_path: Path) -> None:
    """Q8_0: 32 weights share a scale of largest / 127, itself a float16 (ggml's definition)."""
    pytest.importorskip("gguf", reason="needs the extra export")
    student = build_tiny(WIDE, tokenizer="bytes_bpe")
    found = _written("gguf-q8_0", student, tmp_path).state_dict()
    weight = student.model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    blocks = weight.reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    rounded = (torch.round(blocks / scale) * scale.half().float()).reshape(weight.shape)
    torch.testing.assert_close(found["model.layers.0.mlp.up_proj.weight"], rounded, atol=1e-6, rtol=0)


def test_gguf_refuses_what_it_would_not_keep(tiny_t5: Callable[..., LoadedModel]) -> None:
    pytest.importorskip("gguf", reason="needs the extra export")
    (one, blocks) = chosen_formats(["gguf", "gguf-q8_0"])
    words = tiny_t5()
    said = one.why_not(words.model, words.tokenizer)
    assert "a t5 is none of llama, qwen2, qwen3" in said
    assert "convert_hf_to_gguf.py" in said

    def why(which: Any = one, tokenizer: str = "bytes_bpe", **sizes: Any) -> str:
        student = build_tiny(WIDE | sizes, tokenizer=tokenizer)
        return which.why_not(weightless(student.model.config), student.tokenizer)

    assert why() == ""
    assert "no byte-level BPE (WordLevel)" in why(tokenizer="words")
    assert "biases" in why(attention_bias=True)
    assert "positions are scaled (linear)" in why(
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    )
    assert "not 128 wide" in why(model_type="qwen3", head_dim=8)
    assert "multiples of 32" in why(blocks, hidden_size=48, head_dim=12)


def test_gguf_knows_how_texts_are_cut(tmp_path: Path) -> None:
    """A tokenizer that cuts as Llama 3 does has that name in the file; one that cuts otherwise is refused."""
    gguf = pytest.importorskip("gguf", reason="needs the extra export")
    from tokenizers import Regex, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    student = build_tiny(WIDE, tokenizer="bytes_bpe")
    (one,) = chosen_formats(["gguf"])

    def cut_by(split: str) -> None:
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        steps = [pre_tokenizers.Split(Regex(split), behavior="isolated"), bytes_of]
        student.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)

    cut_by(GGUF_PRE_TOKENIZER_SPLITS["qwen2"])
    one.write(student, tmp_path)
    field = gguf.GGUFReader(tmp_path / "model.gguf").get_field("tokenizer.ggml.pre")
    assert GGUF_PRE_TOKENIZER_SPLITS[field.contents()] == GGUF_PRE_TOKENIZER_SPLITS["qwen2"]
    cut_by(r"\s+")
    assert "in a way that has no name in GGUF" in one.why_not(student.model, student.tokenizer)
    assert json.loads(student.tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]["type"] == "Sequence"
