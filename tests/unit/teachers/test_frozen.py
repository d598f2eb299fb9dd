"""The frozen teacher of logits: what it says, and whom it refuses to teach."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch

from distill_llm.core.errors import ConfigError
from distill_llm.core.signals import all_at_once, model_inputs, signals_of
from distill_llm.data.collate import Collator
from distill_llm.data.rows import Row
from distill_llm.losses.forward_kl import ForwardKL
from distill_llm.losses.jensen_shannon import JensenShannon
from distill_llm.losses.logit_mse import LogitMSE
from distill_llm.models.head import OutputHead
from distill_llm.models.load import LoadedModel
from distill_llm.models.quantize import QuantizeSpec, cast_quantized, quantized, save_quantized
from distill_llm.objective import Objective, Term
from distill_llm.schemes.step_by_step import StepByStep
from distill_llm.teachers.beside import ModelBeside
from distill_llm.teachers.frozen import Frozen, FrozenTeacher
from distill_llm.teachers.student import StudentFacts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from distill_llm.losses.base import Loss
    from distill_llm.teachers.base import TensorTeacher

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ROWS = [Row(0, "label", [5, 6, 7], [8, 1]), Row(0, "rationale", [5], [9, 10, 11, 1])]


def _spec(model: LoadedModel, folder: Path) -> Frozen:
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return Frozen(model=str(folder))


def _facts(student: LoadedModel, **changes: Any) -> StudentFacts:
    facts: dict[str, Any] = {
        "vocabulary": student.tokenizer.get_vocab(),
        "is_encoder_decoder": student.is_encoder_decoder,
        "device": "cpu",
    }
    return StudentFacts(**(facts | changes))


def test_it_says_what_the_model_says_without_dropout_or_gradient(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    dropout = "attention_dropout" if tiny_model().model.config.model_type == "llama" else "dropout_rate"
    student, big = tiny_model(seed=1), tiny_model(seed=2, **{dropout: 0.5})
    spec = _spec(big, tmp_path)
    teacher = spec.open(_facts(student))
    batch = Collator(0, 0 if student.is_encoder_decoder else None)(ROWS)
    said = teacher.signals(batch)
    expected = signals_of(big.model.eval()(**model_inputs(batch)).logits, batch)
    torch.testing.assert_close(said.logits, expected.logits)
    assert not said.logits.requires_grad
    assert said.token_ids.tolist() == expected.token_ids.tolist()
    assert spec.num_parameters(0) == big.num_parameters


@pytest.mark.parametrize(("dtype", "tolerance"), [("auto", 1e-6), ("bfloat16", 0.05)])
def test_a_quantized_model_teaches_as_it_speaks(
    dtype: Any,
    tolerance: float,
    tiny_model: Callable[..., LoadedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    big = tiny_model(seed=2)
    model = quantized(big.model, QuantizeSpec(group_size=8))
    save_quantized(model, tmp_path)
    big.tokenizer.save_pretrained(tmp_path)
    spec = Frozen(model=str(tmp_path), dtype=dtype)
    spec.check()
    teacher = spec.open(_facts(tiny_model(seed=1)))
    batch = Collator(0, 0 if big.is_encoder_decoder else None)(ROWS)
    expected = signals_of(cast_quantized(model.eval(), dtype)(**model_inputs(batch)).logits, batch).logits
    torch.testing.assert_close(teacher.signals(batch).logits, expected, atol=tolerance, rtol=0)
    lazily = teacher.lazy_signals(batch)  # type: ignore[attr-defined]
    torch.testing.assert_close(all_at_once(lazily).logits, expected, atol=tolerance, rtol=0)
    assert spec.num_parameters(0) == tiny_model().num_parameters
    monkeypatch.setattr("distill_llm.core.extras.is_there", lambda package: package != "torchao")
    with pytest.raises(ConfigError, match=r"teachers: frozen .*\(its weights are quantized\).*distill-llm\[quantize\]"):
        spec.check()


def test_another_family_is_refused(
    tiny_t5: Callable[..., LoadedModel], tiny_llama: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    spec = _spec(tiny_llama(), tmp_path)
    with pytest.raises(ConfigError, match=r"teacher is decoder-only, the student is an encoder-decoder.*rationales"):
        spec.open(_facts(tiny_t5()))


def test_another_vocabulary_is_refused_with_the_words_that_differ(
    tiny_t5: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    """Also where both have the same number of entries, and only some stand elsewhere."""
    student, spec = tiny_t5(text="ann bob carl"), _spec(tiny_t5(text="ann bob dora"), tmp_path)
    with pytest.raises(ConfigError, match=r"different vocabularies \(6 and 6 entries; 1 of .* \['carl'\]") as caught:
        spec.open(_facts(student))
    assert "teachers: frozen" in str(caught.value)
    assert "student.tokenizer" in str(caught.value)


def _cut(model: LoadedModel) -> LoadedModel:
    """With a head that ends where its tokenizer does; transformers cuts the embeddings too."""
    cut = copy.deepcopy(model.model)
    cut.resize_token_embeddings(len(model.tokenizer))
    return LoadedModel(cut, model.tokenizer)


def _soft_loss(
    student: LoadedModel, teacher: TensorTeacher, loss: Loss, chunk_tokens: int = 0
) -> tuple[torch.Tensor, ...]:
    """The loss of a batch, and its gradients at the student's embeddings and head."""
    batch = Collator(0, 0 if student.is_encoder_decoder else None)(ROWS)
    batch = {name: column.to(student.model.device) for name, column in batch.items()}
    head = OutputHead(student.model, chunk_tokens=chunk_tokens) if chunk_tokens else None
    term = Term(name="soft", loss=loss, targets=("label", "rationale"), teacher="big")
    objective = Objective([term])
    ((said, taught),) = StepByStep().compare(student.model, {"big": teacher}, batch, objective, head)
    total, _ = objective(said, taught, objective.counts(batch))
    weights = [student.model.get_input_embeddings().weight, student.model.get_output_embeddings().weight]
    return (total.detach(), *torch.autograd.grad(total, weights))


@pytest.mark.parametrize("loss", [ForwardKL(temperature=2.0), JensenShannon(), LogitMSE()], ids=lambda loss: loss.kind)
@pytest.mark.parametrize("widths", [(64, 80), (80, 64), (None, 64), (64, None)], ids=str)
def test_what_a_head_has_beyond_the_tokenizer_counts_for_nothing(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path, widths: tuple[int | None, int | None], loss: Loss
) -> None:
    """One tokenizer, heads padded as each model likes: loss and gradients are those of heads cut to it."""
    student, big = (
        tiny_model(seed=seed, **({"vocab_size": width} if width else {}))
        for seed, width in zip((1, 2), widths, strict=True)
    )
    words = len(student.tokenizer)
    assert words < 64
    with torch.no_grad():  # loud, so that it would be heard
        big.model.get_output_embeddings().weight[words:] += 9.0
    teacher = _spec(big, tmp_path / "big").open(_facts(student))
    value, *gradients = _soft_loss(student, teacher, loss)
    expected, *narrow = _soft_loss(_cut(student), FrozenTeacher(_cut(big).model), loss)
    assert expected > 1e-4
    torch.testing.assert_close(value, expected)
    for wide, cut in zip(gradients, narrow, strict=True):
        torch.testing.assert_close(wide[:words], cut)
        assert wide[words:].abs().sum() == 0


def test_a_missing_teacher_is_a_config_error() -> None:
    spec = Frozen(model="./runs/nothing/here")
    with pytest.raises(ConfigError, match=r"teachers: frozen .* there is no folder"):
        spec.num_parameters(0)


@pytest.mark.parametrize(
    ("student_on", "teacher_on"),
    [
        ("cpu", "cpu:0"),  # another name of the one CPU: signals come and go as between two devices
        pytest.param("cpu", "cuda", marks=needs_gpu),
        pytest.param("cuda", "cpu", marks=needs_gpu),
    ],
)
@pytest.mark.parametrize("chunk_tokens", [0, 2])
def test_a_teacher_on_another_device_says_the_same(
    tiny_model: Callable[..., LoadedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    student_on: str,
    teacher_on: str,
    chunk_tokens: int,
) -> None:
    student, big = tiny_model(seed=1), tiny_model(seed=2)
    expected = _soft_loss(student, FrozenTeacher(big.model), ForwardKL(), chunk_tokens)
    student.model.to(student_on)
    spec = _spec(big, tmp_path).model_copy(update={"device": teacher_on.removesuffix(":0")})
    teacher = spec.open(_facts(student, device=student_on))
    if teacher_on == "cpu:0":
        assert torch.device("cpu:0") != torch.device("cpu")
        monkeypatch.setattr(ModelBeside, "_device", torch.device("cpu:0"))
    found = _soft_loss(student, teacher, ForwardKL(), chunk_tokens)
    for value, wanted in zip(found, expected, strict=True):
        assert value.device.type == student_on
        torch.testing.assert_close(value.cpu(), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_fewer_bits_say_nearly_the_same(
    tiny_llama: Callable[..., LoadedModel], tmp_path: Path, load_in: str, device: str
) -> None:
    """Weights are quantized indeed, the head (of the tokenizer's words) is not, and chunks see what all at once see."""
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    student, big = tiny_llama(seed=1), tiny_llama(seed=2, **sizes)
    spec = _spec(big, tmp_path).model_copy(update={"load_in": load_in, "dtype": "float32"})
    spec.check()
    student.model.to(device)
    teacher: Any = spec.open(_facts(student, device=device))
    kinds = {type(weight).__name__ for weight in teacher._model.parameters()}
    assert {"8bit": "Int8Params", "4bit": "Params4bit"}[load_in] in kinds
    assert spec.num_parameters(0) == big.num_parameters
    batch = {name: column.to(device) for name, column in Collator(0, None)(ROWS).items()}
    full, said = FrozenTeacher(big.model.to(device)).signals(batch).logits, teacher.signals(batch).logits
    assert not torch.equal(said, full)
    assert (said - full).norm() < 0.2 * full.norm()
    for value, wanted in zip(
        _soft_loss(student, teacher, ForwardKL(), 2), _soft_loss(student, teacher, ForwardKL()), strict=True
    ):
        torch.testing.assert_close(value, wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"device": "gpu"}, r"teachers: frozen .*\.device: 'gpu' is no device"),
        ({"device": "cuda:99"}, r"'cuda:99' is not here"),
    ],
    ids=str,
)
def test_a_device_that_is_not_there_is_found_before_anything_is_loaded(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Frozen.model_validate({"model": "./runs/nothing/here"} | wrong).check()
