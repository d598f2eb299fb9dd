"""Trainings of rounded students: the same update however a step is cut, to the bit after a resume, and better than
quantizing afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback, set_seed

from distill_llm.core.errors import Interrupted
from distill_llm.data.rows import Row
from distill_llm.losses.cross_entropy import CrossEntropy
from distill_llm.losses.forward_kl import ForwardKL
from distill_llm.losses.hint import Hint
from distill_llm.models.layers import add_heads
from distill_llm.models.load import LoadedModel, load_model
from distill_llm.models.quantize import QuantizeSpec, is_quantized, quantized
from distill_llm.objective import Objective, Term
from distill_llm.recipe.train import TrainSpec
from distill_llm.schemes.quantization_aware import QuantizationAware
from distill_llm.schemes.step_by_step import StepByStep
from distill_llm.teachers.ema import EmaTeacher
from distill_llm.teachers.frozen import FrozenTeacher
from distill_llm.training.train import fit, make_trainer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from distill_llm.training.trainer import DistillTrainer

ROWS = [
    row
    for example in range(4)
    for row in (
        Row(example, "label", [*range(5, 8 + example)], [8 + example, 1]),
        Row(example, "rationale", [*range(6, 10 + example)], [*range(9, 13 + 3 * example), 1]),
    )
]
TERMS = [
    Term(name="label", loss=CrossEntropy(), targets=("label",)),
    Term(name="rationale", loss=CrossEntropy(), targets=("rationale",), weight=0.5),
    Term(name="own", loss=ForwardKL(), targets=("label", "rationale"), teacher="own", weight=0.5),
]
FULL_ACTIVATIONS = {"weights": "int4", "activations": "full", "group_size": 8}


def _scheme(keys: dict[str, Any] | None = None, **options: Any) -> QuantizationAware:
    return QuantizationAware(quantize=QuantizeSpec.model_validate(keys or {"group_size": 8}), **options)


def _trainer(
    student: LoadedModel,
    folder: Path,
    scheme: Any,
    *,
    teachers: dict[str, Any] | None = None,
    terms: list[Term] = TERMS,
    max_steps: int = 4,
    validate: Any = None,
    widths: Any = None,
    **keys: Any,
) -> DistillTrainer:
    """Of a student that is its own teacher, as it is before the training."""
    own = {"own": FrozenTeacher(_copy(student))} if teachers is None else teachers
    spec: dict[str, Any] = {
        "max_steps": max_steps,
        "rows_per_step": 8,
        "rows_per_batch": 8,
        "optimizer": "adafactor",
        "learning_rate": 1e-2,
        "validate_every": 2,
    }
    set_seed(3)
    student = scheme.assemble(student, None, 3)
    add_heads(student.model, widths or {})
    return make_trainer(
        student,
        ROWS,
        spec=TrainSpec.model_validate(spec | keys),
        max_steps=max_steps,
        scheme=scheme,
        objective=Objective(terms),
        teachers=own,
        validate=validate,
        folder=folder,
        seed=3,
    )


def _copy(student: LoadedModel) -> Any:
    other = type(student.model)(student.model.config)
    other.load_state_dict(student.model.state_dict())
    return other


def _weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize(
    ("keys", "tolerance"),
    [
        (FULL_ACTIVATIONS, 2e-6),
        ({"weights": "int8", "activations": "full", "group_size": "row", "embeddings": "int8"}, 2e-6),
        ({"group_size": 8}, 1e-3),  # a state on the edge between two of 255 steps falls to either side
    ],
)
def test_the_update_does_not_depend_on_how_a_step_is_cut(
    keys: dict[str, Any], tolerance: float, tiny_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    found = []
    for rows in (8, 2, 1):
        trainer = _trainer(tiny_model(seed=1), tmp_path / str(rows), _scheme(keys), max_steps=1, rows_per_batch=rows)
        before = _weights(trainer.model)
        trainer.train()
        found.append(_weights(trainer.model))
    assert max((found[0][name] - before[name]).abs().max() for name in before) > 1e-3
    for name, weight in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[name], weight, atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize("tied", [True, False])
def test_a_rounded_head_in_chunks_is_the_head_at_once(
    tied: bool, tiny_llama: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    keys = FULL_ACTIVATIONS | ({"embeddings": "int8"} if tied else {"head": True})
    found = []
    for chunk in (3, 0):
        student = tiny_llama(seed=1, tie_word_embeddings=tied)
        trainer = _trainer(student, tmp_path / str(chunk), _scheme(keys), max_steps=1, chunk_tokens=chunk)
        trainer.train()
        found.append(_weights(trainer.model))
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert (found[0][head] - _weights(tiny_llama(seed=1, tie_word_embeddings=tied).model)[head]).abs().max() > 1e-4
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, atol=2e-6, rtol=0, msg=name)


def test_a_resume_in_the_middle_gives_the_same_model_to_the_bit(
    tiny_t5: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    """Across the step from which on it is rounded, and with an average of itself as a teacher."""
    scheme = _scheme(after=0.5)

    def trainer(folder: str) -> DistillTrainer:
        student = tiny_t5(seed=1, dropout_rate=0.2)
        own = EmaTeacher(student.model, decay=0.5)
        return _trainer(student, tmp_path / folder, scheme, teachers={"own": own}, max_steps=6, validate_every=1)

    fit(trainer("whole"), tmp_path / "whole")
    for stop in (2, 4):  # before and after the third step
        steps = iter(range(1, 100))
        folder = f"stopped-{stop}"
        with pytest.raises(Interrupted):
            fit(trainer(folder), tmp_path / folder, stop_when=lambda steps=steps, stop=stop: next(steps) == stop)
        fit(trainer(folder), tmp_path / folder)
        one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", folder))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


class _Keep(TrainerCallback):
    """Notes the weights after each step."""

    def __init__(self, seen: list[Any]):
        self._seen = seen

    def on_step_end(self, *ignored: Any, **known: Any) -> None:
        self._seen.append(_weights(known["model"]))


def test_before_after_it_learns_in_full_precision_and_is_validated_rounded(
    tiny_t5: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"weights": "int2", "group_size": "row"}
    scheme = _scheme(keys, after=0.5)
    ids = torch.tensor([[5, 6, 7, 8]])
    said, expected = [], []

    def validate(model: Any) -> dict[str, float]:
        for _, one in scheme.each(model):
            said.append(one(input_ids=ids, decoder_input_ids=ids).logits)
        plain = tiny_t5(seed=1)
        plain.model.load_state_dict(model.state_dict())
        expected.append(quantized(plain.model, scheme.quantize)(input_ids=ids, decoder_input_ids=ids).logits)
        return {"accuracy": 0.5}

    trainer = _trainer(tiny_t5(seed=1), tmp_path / "rounded", scheme, validate=validate)
    full = _trainer(tiny_t5(seed=1), tmp_path / "full", StepByStep())
    weights: dict[str, list[Any]] = {"rounded": [], "full": []}
    for name, one in (("rounded", trainer), ("full", full)):
        one.add_callback(_Keep(weights[name]))
        one.train()
    assert len(said) == 2
    for one, other in zip(said, expected, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(*weights.values(), strict=True)]
    assert same == [True, True, False, False]


def test_what_is_saved_is_what_it_learned_to_be_and_hint_heads_are_not_in_it(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    student, scheme = tiny_model(seed=1), _scheme()
    wide = {"d_model": 24} if student.is_encoder_decoder else {"hidden_size": 24}
    teacher = FrozenTeacher(tiny_model(seed=2, **wide).model)
    hint = Term(name="hint", loss=Hint(layers="last"), targets=("label",), teacher="own")
    terms = [TERMS[0], hint]
    teacher.show(Objective(terms).reading("own"))
    widths = {"hint": [(16, 24)]}
    trainer = _trainer(student, tmp_path, scheme, teachers={"own": teacher}, terms=terms, widths=widths)
    ids = torch.tensor([[5, 6, 7, 8]])
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if student.is_encoder_decoder else {})
    trainer.train()
    said = student.model.eval()(**inputs).logits
    trainer.save_learners(tmp_path)
    loaded = load_model(str(tmp_path / "model"), where="test").eval()
    torch.testing.assert_close(loaded(**inputs).logits, said, atol=0, rtol=0)
    assert is_quantized(loaded.config)
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    assert sum(one.numel() for one in loaded.parameters()) == tiny_model().num_parameters


def test_learning_with_it_beats_quantizing_afterwards(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """Of the same weights, and of those trained on in full precision for as many steps."""
    keys: dict[str, Any] = {"weights": "int2", "group_size": "row"}
    start = tiny_t5(seed=1)
    fast: dict[str, Any] = {"teachers": {}, "terms": TERMS[:2], "max_steps": 30}
    _trainer(start, tmp_path / "start", StepByStep(), **fast).train()
    losses = {"afterwards": _loss(quantized(_copy(start), QuantizeSpec.model_validate(keys)))}
    for name, scheme in (("longer", StepByStep()), ("aware", _scheme(keys))):
        student = LoadedModel(_copy(start), start.tokenizer)
        _trainer(student, tmp_path / name, scheme, **fast).train()
        losses[name] = _loss(quantized(student.model, QuantizeSpec.model_validate(keys)))
    assert losses["aware"] < 0.8 * losses["longer"], losses
    assert losses["aware"] < 0.8 * losses["afterwards"]


def _loss(model: Any) -> float:
    """Of the rows' targets, nats a token."""
    model.eval()
    total, count = 0.0, 0
    for row in ROWS:
        labels = torch.tensor([list(row.label_ids)])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([list(row.input_ids)]), labels=labels).logits
        total += float(cross_entropy(logits[0], labels[0], reduction="sum"))
        count += labels.size(1)
    return total / count


def test_bfloat16_and_checkpointed_gradients(tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    found = []
    for keys in ({}, {"gradient_checkpointing": True}, {"precision": "bfloat16"}):
        folder = tmp_path / "-".join(["run", *keys])
        trainer = _trainer(tiny_model(seed=1), folder, _scheme(FULL_ACTIVATIONS), max_steps=1, **keys)
        trainer.train()
        found.append(_weights(trainer.model))
        trainer.save_learners(folder)
        assert is_quantized(load_model(str(folder / "model"), where="test").config)
    plain, cheap, short = found
    for name, weight in plain.items():
        torch.testing.assert_close(cheap[name], weight, atol=2e-6, rtol=0, msg=name)
        assert torch.isfinite(short[name]).all()
        assert (short[name] - weight).abs().max() < 0.1


TRAINING = """
import sys
from pathlib import Path
import torch
from distill_llm.core.processes import rank
from distill_llm.data.rows import Row
from distill_llm.losses.cross_entropy import CrossEntropy
from distill_llm.models.load import LoadedModel, load_model, read_tokenizer
from distill_llm.models.quantize import QuantizeSpec
from distill_llm.objective import Objective, Term
from distill_llm.recipe.train import TrainSpec
from distill_llm.schemes.quantization_aware import QuantizationAware
from distill_llm.training.train import make_trainer

rows = []
for example in range(8):
    rows.append(Row(example, "label", [*range(5 + example, 8 + example + example % 4)], [6 + example, 1]))
    rows.append(Row(example, "rationale", [*range(5 + example, 9 + example)], [*range(8, 12 + 3 * example), 1]))
for family in ("t5", "llama"):
    student = LoadedModel(load_model(family, where="test"), read_tokenizer(family, where="test"))
    scheme = QuantizationAware(quantize=QuantizeSpec(activations="full", group_size=8, embeddings="int8"))
    terms = [Term(name="label", loss=CrossEntropy(), targets=("label",)),
             Term(name="rationale", loss=CrossEntropy(), targets=("rationale",), weight=0.5)]
    spec = TrainSpec(max_steps=1, rows_per_step=8, rows_per_batch=2, learning_rate=1e-2, optimizer="adafactor")
    folder = Path(sys.argv[1]) / family
    trainer = make_trainer(scheme.assemble(student, None, 3), rows, spec=spec, max_steps=1, scheme=scheme,
                           objective=Objective(terms), teachers={}, validate=None, folder=folder, seed=3)
    trainer.train()
    torch.save(dict(student.model.named_parameters()), folder / f"weights-{rank()}.pt")
    trainer.save_learners(folder)
"""


@pytest.mark.slow
def test_two_processes_train_what_one_process_trains(
    tiny_t5: Callable[..., LoadedModel],
    tiny_llama: Callable[..., LoadedModel],
    launch: Callable[..., Any],
    tmp_path: Path,
) -> None:
    for family, build in (("t5", tiny_t5), ("llama", tiny_llama)):
        for part in (build(seed=1).model, build(seed=1).tokenizer):
            part.save_pretrained(tmp_path / family)
    (tmp_path / "training.py").write_text(TRAINING)
    for folder, processes in (("one", 0), ("two", 2)):
        launch("training.py", folder, processes=processes, CUDA_VISIBLE_DEVICES="")
    for family in ("t5", "llama"):
        one = torch.load(tmp_path / "one" / family / "weights-0.pt")
        start = dict(load_model(str(tmp_path / family), where="test").named_parameters())
        assert max((one[name] - start[name]).abs().max() for name in one) > 1e-4
        for rank in (0, 1):
            other = torch.load(tmp_path / "two" / family / f"weights-{rank}.pt")
            for name, weight in one.items():
                torch.testing.assert_close(other[name], weight, atol=2e-6, rtol=0, msg=f"{family}, {rank}: {name}")
        said = [load_model(str(tmp_path / way / family / "model"), where="test") for way in ("one", "two")]
        assert all(is_quantized(model.config) for model in said)
