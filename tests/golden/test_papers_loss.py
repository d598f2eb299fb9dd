"""The objective against the losses that Hugging Face's own models compute, and the update against its micro-batches."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch

from distill_llm.core.example import TARGETS
from distill_llm.core.schedule import Schedule
from distill_llm.data.rows import Row
from distill_llm.losses.cross_entropy import CrossEntropy
from distill_llm.losses.forward_kl import ForwardKL
from distill_llm.losses.jensen_shannon import JensenShannon
from distill_llm.models.load import LoadedModel
from distill_llm.objective import Objective, Term
from distill_llm.recipe.train import TrainSpec
from distill_llm.schemes.step_by_step import StepByStep
from distill_llm.teachers.frozen import FrozenTeacher
from distill_llm.training.arguments import make_arguments, make_sampler
from distill_llm.training.train import collator_for
from distill_llm.training.trainer import DistillTrainer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


def _rows(*, num_examples: int = 4, vocabulary: int = 40) -> list[Row]:
    """A short label and a long rationale for each example, all of different lengths and agreements."""
    draw = torch.Generator().manual_seed(5)

    def ids(count: int) -> list[int]:
        return torch.randint(3, vocabulary, (count,), generator=draw).tolist()

    rows = []
    for example in range(num_examples):
        agreement = 1.0 - example / 5
        rows.append(Row(example, "label", ids(4 + example), [*ids(example % 2), 1], agreement))
        rows.append(Row(example, "rationale", ids(5 + 2 * example), [*ids(9 + 5 * example), 1], agreement))
    return rows


def _hard(name: str, target: Any, weight: float) -> Term:
    return Term(name=name, loss=CrossEntropy(), targets=(target,), weight=weight)


def _trainer(
    student: LoadedModel,
    rows: Sequence[Row],
    objective: Objective,
    folder: Path,
    *,
    rows_per_batch: int,
    tokens_per_batch: int = 0,
    steps: int = 1,
    **options: Any,
) -> DistillTrainer:
    spec = TrainSpec(
        max_steps=steps,
        rows_per_step=8,
        rows_per_batch=rows_per_batch,
        tokens_per_batch=tokens_per_batch,
        schedule="constant",
        max_grad_norm=1e9,
    )
    sampler = make_sampler(rows, spec, max_steps=steps, seed=3)
    micro_batches = sampler.micro_batches
    return DistillTrainer(
        model=student.model,
        args=make_arguments(spec, folder, max_steps=steps, seed=3, validates=False, micro_batches=micro_batches),
        rows=rows,
        step_sampler=sampler,
        collator=collator_for(student, {}),
        scheme=StepByStep(),
        objective=objective,
        **options,
    )


def _own_loss(student: LoadedModel, rows: Sequence[Row]) -> torch.Tensor:
    """What the transformers model itself calls its loss, for rows of one target: labels padded by hand with -100."""
    is_t5 = student.is_encoder_decoder
    inputs = [list(row.input_ids) if is_t5 else [*row.input_ids, *row.label_ids] for row in rows]
    labels = [list(row.label_ids) if is_t5 else [-100] * len(row.input_ids) + list(row.label_ids) for row in rows]

    def pad(lists: list[list[int]], value: int) -> torch.Tensor:
        width = max(map(len, lists))
        return torch.tensor([ids + [value] * (width - len(ids)) for ids in lists])

    mask = pad([[1] * len(ids) for ids in inputs], 0)
    return student.model(input_ids=pad(inputs, 0), attention_mask=mask, labels=pad(labels, -100)).loss


@pytest.mark.parametrize("rationale_weight", [0.0625, 0.5, 1.0, 3.0])
def test_label_plus_weighted_rationale_is_the_sum_of_t5s_own_losses(
    tiny_t5: Callable[..., LoadedModel], tmp_path: Path, rationale_weight: float
) -> None:
    """Hsieh et al. 2023, arXiv:2305.02301, eq. 3, in the form of its code: two forward passes, each with its mean."""
    student, rows = tiny_t5(seed=1), _rows()
    objective = Objective([_hard("label", "label", 1.0), _hard("rationale", "rationale", rationale_weight)])
    trainer = _trainer(student, rows, objective, tmp_path, rows_per_batch=8)
    ours = trainer.compute_loss(student.model, trainer.collator(rows))
    label = _own_loss(student, [row for row in rows if row.target == "label"])
    rationale = _own_loss(student, [row for row in rows if row.target == "rationale"])
    assert abs(label - rationale) > 1e-3, "the two must differ, or a wrong weight would not be seen"
    torch.testing.assert_close(ours, label + rationale_weight * rationale, atol=1e-6, rtol=1e-6)


def test_papers_alpha(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """The published code weighs alpha * label + (1 - alpha) * rationale; its runs take alpha = 0.5."""
    alpha = 0.5
    student, rows = tiny_t5(seed=2), _rows()
    objective = Objective([_hard("label", "label", alpha), _hard("rationale", "rationale", 1 - alpha)])
    trainer = _trainer(student, rows, objective, tmp_path, rows_per_batch=8)
    label = _own_loss(student, [row for row in rows if row.target == "label"])
    rationale = _own_loss(student, [row for row in rows if row.target == "rationale"])
    ours = trainer.compute_loss(student.model, trainer.collator(rows))
    torch.testing.assert_close(ours, alpha * label + (1 - alpha) * rationale, atol=1e-6, rtol=1e-6)


def test_padding_changes_nothing(tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """The mean over tokens of a padded batch is that of its rows, one by one, weighed by their tokens."""
    student, rows = tiny_model(seed=3), _rows()
    trainer = _trainer(student, rows, Objective([_hard("r", "rationale", 1.0)]), tmp_path, rows_per_batch=8)
    ours = trainer.compute_loss(student.model, trainer.collator(rows))
    long = [row for row in rows if row.target == "rationale"]
    alone = sum(_own_loss(student, [row]) * len(row.label_ids) for row in long)
    torch.testing.assert_close(ours, alone / sum(len(row.label_ids) for row in long), atol=1e-6, rtol=1e-6)


def test_one_term_on_llama_is_its_own_loss(tiny_llama: Callable[..., LoadedModel], tmp_path: Path) -> None:
    student, rows = tiny_llama(seed=4), _rows()
    term = Term(name="all", loss=CrossEntropy(), targets=("label", "rationale"))
    trainer = _trainer(student, rows, Objective([term]), tmp_path, rows_per_batch=8)
    ours = trainer.compute_loss(student.model, trainer.collator(rows))
    torch.testing.assert_close(ours, _own_loss(student, rows), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_update_does_not_depend_on_the_micro_batches(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path, optimizer: str
) -> None:
    """8 rows at once, 2 x 4, 4 x 2 and 8 x 1, and cuts by padded tokens, give the same parameters, to float64's
    precision; and so does autograd on the formula written out."""
    rows = _rows()
    start, teacher = tiny_model(seed=6), tiny_model(seed=7)
    start.model.double()
    teacher.model.double()
    soft = Term(name="soft", loss=ForwardKL(temperature=2.0), targets=("label",), weight=0.3, teacher="big")
    objective = Objective([_hard("label", "label", 1.0), _hard("rationale", "rationale", 0.5), soft])
    after, micro_batches = {}, []
    for cut in ((8, 0), (4, 0), (2, 0), (1, 0), (8, 36), (8, 60), (8, 1000)):
        student = LoadedModel(copy.deepcopy(start.model), start.tokenizer)
        trainer = _trainer(
            student,
            rows,
            objective,
            tmp_path / str(cut),
            rows_per_batch=cut[0],
            tokens_per_batch=cut[1],
            teachers={"big": FrozenTeacher(teacher.model)},
            optimizers=(_optimizer(optimizer, student.model), None),
        )
        trainer.train()
        after[cut] = dict(student.model.named_parameters())
        micro_batches.append(trainer.args.gradient_accumulation_steps)
    assert micro_batches == [1, 2, 4, 8, 5, 4, 1]
    expected = LoadedModel(copy.deepcopy(start.model), start.tokenizer)
    reference = _optimizer(optimizer, expected.model)
    _formula(expected, teacher, rows).backward()
    reference.step()
    for name, weight in expected.model.named_parameters():
        for cut, weights in after.items():
            moved = (weights[name] - weight).abs().max().item()
            assert moved < 1e-6, f"{name} is {moved} off with (rows, tokens) {cut} a micro-batch"
    moved = max((weight - start.model.get_parameter(name)).abs().max() for name, weight in after[1, 0].items())
    assert moved > 1e-3, "the step must be large beside the tolerance"


CHANGING = Objective(
    [
        Term(
            name="label",
            loss=CrossEntropy(),
            targets=("label",),
            weight=Schedule(start=0.5, end=1.5, over=0.5),
            row_weight="agreement",
        ),
        Term(name="rationale", loss=CrossEntropy(), targets=("rationale",), row_weight="agreement"),
        Term(
            name="soft",
            loss=JensenShannon(mixture=0.3, temperature=Schedule(start=4.0, end=2.0)),
            targets=("rationale",),
            weight=5.0,
            until=0.5,
            row_weight="agreement",
            teacher="big",
        ),
    ]
)


def test_nor_with_schedules_and_row_weights(tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """Four steps of 8 rows, cut in four ways, against the formula with its numbers of each step written out."""
    rows, start, teacher = _rows(), tiny_model(seed=6), tiny_model(seed=7)
    start.model.double()
    teacher.model.double()
    expected = LoadedModel(copy.deepcopy(start.model), start.tokenizer)
    reference = _optimizer("sgd", expected.model)
    for label_weight, temperature in ((0.5, 4.0), (1.0, 3.5), (1.5, None), (1.5, None)):
        reference.zero_grad()
        _changing_formula(expected, teacher, rows, label_weight, temperature).backward()
        reference.step()
    for rows_per_batch in (8, 4, 2, 1):
        student = LoadedModel(copy.deepcopy(start.model), start.tokenizer)
        trainer = _trainer(
            student,
            rows,
            CHANGING,
            tmp_path / str(rows_per_batch),
            rows_per_batch=rows_per_batch,
            steps=4,
            teachers={"big": FrozenTeacher(teacher.model)},
            optimizers=(_optimizer("sgd", student.model), None),
        )
        trainer.train()
        for name, weight in expected.model.named_parameters():
            off = (student.model.get_parameter(name) - weight).abs().max().item()
            assert off < 2e-6, f"{name} is {off} off with {rows_per_batch} rows a micro-batch"
    moved = max(
        (weight - start.model.get_parameter(name)).abs().max() for name, weight in expected.model.named_parameters()
    )
    assert moved > 1e-2, "the steps must be large beside the tolerance"


def _changing_formula(
    student: LoadedModel, teacher: LoadedModel, rows: Sequence[Row], label_weight: float, temperature: float | None
) -> torch.Tensor:
    """CHANGING at one step, row by row, in float64; no temperature where the teacher's term has ended."""
    sums: dict[str, list[torch.Tensor]] = {"label": [], "rationale": [], "soft": []}
    for row in rows:
        z, t = (_label_logits(model, row) for model in (student, teacher))
        ids = torch.tensor(row.label_ids)
        sums[row.target] += list(-row.agreement * z.log_softmax(-1)[torch.arange(len(ids)), ids])
        if row.target == "rationale" and temperature:
            p, q = (t / temperature).softmax(-1).detach(), (z / temperature).softmax(-1)
            m = 0.3 * p + 0.7 * q
            each = 0.3 * (p * (p / m).log()).sum(-1) + 0.7 * (q * (q / m).log()).sum(-1)
            sums["soft"] += list(row.agreement * temperature**2 * each)
    loss = label_weight * torch.stack(sums["label"]).mean() + torch.stack(sums["rationale"]).mean()
    return loss + 5.0 * torch.stack(sums["soft"]).mean() if temperature else loss


def _optimizer(name: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    # eps is large beside the rounding of losses in float32, which AdamW's division would blow up where gradients vanish
    return (
        torch.optim.SGD(model.parameters(), lr=0.1)
        if name == "sgd"
        else torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    )


def _formula(student: LoadedModel, teacher: LoadedModel, rows: Sequence[Row]) -> torch.Tensor:
    """label + 0.5 rationale + 0.3 * 2^2 KL at temperature 2, row by row, in float64, without our objective."""
    total: Any = 0.0
    sums: dict[str, list[torch.Tensor]] = {"label": [], "rationale": [], "soft": []}
    for row in rows:
        log_q, log_p = (_label_logits(model, row) for model in (student, teacher))
        ids = torch.tensor(row.label_ids)
        sums[row.target] += list(-log_q.log_softmax(-1)[torch.arange(len(ids)), ids])
        if row.target == "label":
            p, q = (log_p / 2).softmax(-1).detach(), (log_q / 2).softmax(-1)
            sums["soft"] += list((p * (p / q).log()).sum(-1) * 4)
    for name, weight in (("label", 1.0), ("rationale", 0.5), ("soft", 0.3)):
        total = total + weight * torch.stack(sums[name]).mean()
    return total


def _label_logits(model: LoadedModel, row: Row) -> torch.Tensor:
    """Logits at the tokens of one row's label, without padding."""
    if model.is_encoder_decoder:
        start = model.model.config.decoder_start_token_id
        shifted = torch.tensor([[start, *row.label_ids[:-1]]])
        return model.model(input_ids=torch.tensor([row.input_ids]), decoder_input_ids=shifted).logits[0]
    ids = torch.tensor([[*row.input_ids, *row.label_ids]])
    return model.model(input_ids=ids).logits[0, len(row.input_ids) - 1 : -1]


def test_rows_of_the_test_data_are_what_they_claim() -> None:
    """Labels of one and two tokens beside rationales of up to 25: unequal means, or the tests above show little."""
    lengths = {target: {len(row.label_ids) for row in _rows() if row.target == target} for target in TARGETS}
    assert lengths["label"] == {1, 2}
    assert min(lengths["rationale"]) >= 10
    assert len(lengths["rationale"]) == 4
