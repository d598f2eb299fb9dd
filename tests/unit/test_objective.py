"""The objective: what is counted, what is averaged, and which teacher is asked about which rows."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import ceil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import ValidationError

from distill_llm.core.schedule import Schedule
from distill_llm.core.signals import Signals, signals_of
from distill_llm.data.collate import Collator
from distill_llm.data.rows import Row
from distill_llm.losses.cross_entropy import CrossEntropy
from distill_llm.losses.forward_kl import ForwardKL
from distill_llm.objective import Objective, Term, targets_of
from distill_llm.schemes.step_by_step import StepByStep
from distill_llm.teachers.frozen import FrozenTeacher

if TYPE_CHECKING:
    from collections.abc import Callable

    from distill_llm.models.load import LoadedModel

ROWS = [
    Row(0, "label", [5, 6, 7], [8, 1]),
    Row(0, "rationale", [5], [9, 10, 11, 12, 13, 1]),
    Row(1, "label", [5, 6], [1]),
    Row(1, "rationale_then_label", [5, 6], [9, 8, 1]),
]
LABEL = Term(name="label", loss=CrossEntropy(), targets=("label",))
RATIONALE = Term(name="rationale", loss=CrossEntropy(), targets=("rationale",), weight=0.5)
BOTH = Term(name="both", loss=CrossEntropy(), targets=("label", "rationale"))
SOFT = Term(name="soft", loss=ForwardKL(), targets=("label",), teacher="big", weight=2.0)
SOFT_LONG = Term(name="soft_long", loss=ForwardKL(), targets=("rationale_then_label",), teacher="big")


def _signals(seed: int, targets: list[int], vocabulary: int = 6) -> Signals:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(targets), vocabulary, generator=draw)
    return Signals(logits, torch.arange(len(targets)) % vocabulary, torch.tensor(targets, dtype=torch.long))


@pytest.mark.parametrize("start", [0, None])
def test_counts_are_supervised_tokens_of_each_terms_targets(start: int | None) -> None:
    batch = Collator(0, start)(ROWS)
    assert Objective([LABEL, RATIONALE, BOTH, SOFT, SOFT_LONG]).counts(batch).tolist() == [3, 6, 9, 3, 3]


def test_a_decoders_first_token_is_not_counted_because_nothing_predicts_it() -> None:
    batch = Collator(0, None)([Row(0, "label", [], [4, 5, 1])])
    assert Objective([LABEL]).counts(batch).tolist() == [2]
    assert len(signals_of(torch.zeros(1, 3, 6), batch).token_ids) == 2


def test_rows_for_a_teacher_are_those_of_the_terms_that_name_it() -> None:
    batch = Collator(0, 0)(ROWS)
    other = SOFT.model_copy(update={"name": "other", "teacher": "small", "targets": ("rationale",)})
    objective = Objective([LABEL, RATIONALE, SOFT, SOFT_LONG, other])
    assert objective.rows_for("big", batch).tolist() == [True, False, True, True]
    assert objective.rows_for("small", batch).tolist() == [False, True, False, False]
    assert objective.rows_for("nobody", batch).tolist() == [False] * 4


def test_each_term_is_divided_by_the_count_it_is_given_and_weighed() -> None:
    """The counts are those of the whole step: larger than what this micro-batch holds."""
    student = _signals(1, [0, 1, 0, 1, 1])
    loss, means = Objective([LABEL, RATIONALE])(student, {}, torch.tensor([10, 4]))
    each = torch.nn.functional.cross_entropy(student.logits, student.token_ids, reduction="none")
    label, rationale = each[[0, 2]].sum() / 10, each[[1, 3, 4]].sum() / 4
    torch.testing.assert_close(loss, label + 0.5 * rationale)
    torch.testing.assert_close(means, {"label": label, "rationale": rationale})


def test_a_teacher_that_covers_some_targets_is_compared_at_its_own_tokens() -> None:
    """The teacher saw rows of two targets, in their order; each term takes its part, at the same tokens."""
    targets = [0, 1, 0, 2, 1, 2, 2]
    student, everything = _signals(1, targets), _signals(2, targets)
    teacher = everything.where(everything.targets != 1)
    loss, _ = Objective([SOFT, SOFT_LONG])(student, {"big": teacher}, torch.tensor([2, 3]))

    def kl(tokens: list[int]) -> torch.Tensor:
        p, q = everything.logits[tokens].softmax(-1), student.logits[tokens].softmax(-1)
        return (p * (p / q).log()).sum()

    torch.testing.assert_close(loss, 2.0 * kl([0, 2]) / 2 + kl([3, 5, 6]) / 3)


def test_a_batch_without_a_token_for_any_term_still_gives_a_graph() -> None:
    """Under DDP a rank without a graph would leave the others waiting for its gradients."""
    student = _signals(1, [1, 1])
    student.logits.requires_grad_()
    loss, means = Objective([LABEL, SOFT])(student, {"big": _signals(2, [])}, torch.tensor([0, 5]))
    loss.backward()
    assert loss.item() == 0
    assert student.logits.grad is not None
    assert student.logits.grad.abs().max() == 0
    assert [value.item() for value in means.values()] == [0, 0]


def test_the_graph_is_kept_where_logits_are_minus_infinity() -> None:
    """Entries beyond the tokenizer are masked by -inf: zero times them must not be NaN."""
    student = _signals(1, [0, 0])
    logits = student.logits.clone()
    logits[:, 5] = float("-inf")
    logits.requires_grad_()
    loss, _ = Objective([LABEL])(Signals(logits, student.token_ids, student.targets), {}, torch.tensor([2]))
    loss.backward()
    expected = torch.nn.functional.cross_entropy(logits[:, :5].detach(), student.token_ids)
    torch.testing.assert_close(loss.detach(), expected)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_means_carry_no_graph() -> None:
    student = _signals(1, [0])
    student.logits.requires_grad_()
    _, means = Objective([LABEL])(student, {}, torch.tensor([1]))
    assert not means["label"].requires_grad


@pytest.mark.parametrize(
    "keys", [{"loss": {"kind": "forward_kl"}}, {"loss": {"kind": "cross_entropy"}, "teacher": "b"}]
)
def test_a_term_names_a_teacher_exactly_where_its_loss_needs_one(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="teacher"):
        Term.model_validate({"name": "soft", "targets": ["label"], **keys})


def test_targets_come_in_their_fixed_order() -> None:
    assert targets_of([SOFT_LONG, RATIONALE, LABEL]) == ("label", "rationale", "rationale_then_label")
    assert targets_of([SOFT]) == ("label",)


class _Asked:
    """A teacher that notes what it is asked about."""

    def __init__(self, model: LoadedModel):
        self._teacher, self.batches = FrozenTeacher(model.model), []

    def signals(self, batch: dict[str, Any]) -> Signals:
        self.batches.append(batch)
        return self._teacher.signals(batch)


def _compared(
    student: LoadedModel, teachers: dict[str, Any], batch: dict[str, Any], objective: Objective
) -> tuple[Signals, dict[str, Signals]]:
    """What student and teachers say, with all logits at once."""
    ((said, taught),) = StepByStep().compare(student.model, teachers, batch, objective)
    assert isinstance(said, Signals)
    return said, {name: signals for name, signals in taught.items() if isinstance(signals, Signals)}


def test_the_scheme_asks_a_teacher_about_its_own_rows_only(tiny_model: Callable[..., LoadedModel]) -> None:
    """With the same numbers as if it had been asked about everything."""
    student, big = tiny_model(seed=1), tiny_model(seed=2)
    batch = Collator(0, 0 if student.is_encoder_decoder else None)(ROWS)
    teacher, objective = _Asked(big), Objective([RATIONALE, SOFT])
    said, taught = _compared(student, {"big": teacher}, batch, objective)
    (asked,) = teacher.batches
    assert asked["targets"].tolist() == [0, 0]
    assert asked["labels"].size(1) < batch["labels"].size(1)
    everything = FrozenTeacher(big.model).signals(batch)
    torch.testing.assert_close(taught["big"].logits, everything.logits[everything.targets == 0], atol=1e-5, rtol=1e-5)
    assert taught["big"].token_ids.tolist() == said.token_ids[said.targets == 0].tolist()


def test_a_teacher_without_a_row_in_the_batch_is_not_run(tiny_t5: Callable[..., LoadedModel]) -> None:
    student, teacher = tiny_t5(seed=1), _Asked(tiny_t5(seed=2))
    batch = Collator(0, 0)([ROWS[1]])
    said, taught = _compared(student, {"big": teacher}, batch, Objective([RATIONALE, SOFT]))
    assert teacher.batches == []
    assert len(taught["big"].token_ids) == 0
    loss, _ = Objective([RATIONALE, SOFT])(said, taught, torch.tensor([6, 1]))
    torch.testing.assert_close(loss, 0.5 * torch.nn.functional.cross_entropy(said.logits, said.token_ids))


def test_a_scheduled_weight_is_that_of_the_progress() -> None:
    student, counts = _signals(1, [0, 1, 0]), torch.tensor([2, 1])
    falling = RATIONALE.model_copy(update={"weight": Schedule(start=2.0, end=0.5, over=0.5)})
    for progress, weight in ((0.0, 2.0), (0.25, 1.25), (0.5, 0.5), (0.99, 0.5)):
        loss, means = Objective([LABEL, falling]).at(progress)(student, {}, counts)
        torch.testing.assert_close(loss, means["label"] + weight * means["rationale"])


def test_a_weight_of_zero_leaves_no_gradient() -> None:
    student = _signals(1, [1, 1])
    student.logits.requires_grad_()
    faded = RATIONALE.model_copy(update={"weight": Schedule(start=1.0, end=0.0, over=0.5)})
    Objective([faded]).at(0.5)(student, {}, torch.tensor([2]))[0].backward()
    assert student.logits.grad is not None
    assert student.logits.grad.abs().max() == 0


def test_a_term_takes_part_in_the_first_share_of_the_steps_exactly() -> None:
    """In ceil(until * steps) of them, counted with fractions: division must not add or lose a step by rounding."""
    for percent in range(1, 100):
        objective = Objective([LABEL, RATIONALE.model_copy(update={"until": percent / 100})])
        for steps in (1, 3, 7, 10, 30, 49, 100, 300):
            active = [len(objective.at(step / steps).terms) == 2 for step in range(steps)]
            expected = ceil(Fraction(percent, 100) * steps)
            assert active == [True] * expected + [False] * (steps - expected), (percent, steps)


def test_a_teacher_whose_terms_have_ended_is_not_run(tiny_model: Callable[..., LoadedModel]) -> None:
    student, teacher = tiny_model(seed=1), _Asked(tiny_model(seed=2))
    batch = Collator(0, 0 if student.is_encoder_decoder else None)(ROWS)
    objective = Objective([LABEL, SOFT.model_copy(update={"until": 0.5})])
    for progress, asked, terms in ((0.0, 1, {"label", "soft"}), (0.49, 2, {"label", "soft"}), (0.5, 2, {"label"})):
        now = objective.at(progress)
        said, taught = _compared(student, {"big": teacher}, batch, now)
        _, means = now(said, taught, now.counts(batch))
        assert len(teacher.batches) == asked
        assert set(means) == terms


def test_a_teacher_with_another_term_that_goes_on_is_still_run(tiny_t5: Callable[..., LoadedModel]) -> None:
    """And then about the rows of that term alone."""
    student, teacher = tiny_t5(seed=1), _Asked(tiny_t5(seed=2))
    objective = Objective([SOFT.model_copy(update={"until": 0.5}), SOFT_LONG])
    StepByStep().compare(student.model, {"big": teacher}, Collator(0, 0)(ROWS), objective.at(0.6))
    (asked,) = teacher.batches
    assert asked["targets"].tolist() == [2]


AGREED = [row if index % 2 else replace(row, agreement=0.25) for index, row in enumerate(ROWS)]


@pytest.mark.parametrize("start", [0, None])
def test_row_weights_multiply_losses_and_leave_counts_alone(start: int | None) -> None:
    """A row of little agreement adds little; what the others add stays as it was."""
    batch = Collator(0, start)(AGREED)
    logits = torch.randn(4, batch["labels"].size(1), 20, generator=torch.Generator().manual_seed(1))
    student = signals_of(logits, batch)
    weighed = BOTH.model_copy(update={"row_weight": "agreement"})
    assert Objective([weighed]).counts(batch).tolist() == Objective([BOTH]).counts(batch).tolist() == [9]
    each = torch.nn.functional.cross_entropy(student.logits, student.token_ids, reduction="none")
    # the first row has 2 tokens and an agreement of 0.25, the second 6 and the third 1
    shares = torch.tensor([0.25] * 2 + [1.0] * 6 + [0.25])
    loss, means = Objective([weighed])(student, {}, torch.tensor([9]))
    torch.testing.assert_close(loss, (shares * each[:9]).sum() / 9)
    torch.testing.assert_close(means["both"], loss)
    plain, _ = Objective([BOTH])(student, {}, torch.tensor([9]))
    torch.testing.assert_close(plain, each[:9].sum() / 9)


def test_row_weights_count_in_terms_with_a_teacher_too() -> None:
    """Each token of the term has its own row's weight, also where other targets stand between."""
    targets, agreement = [0, 1, 0, 1, 0], torch.tensor([1.0, 0.1, 0.5, 0.1, 0.25])
    student, teacher = replace(_signals(1, targets), agreement=agreement), _signals(2, targets)
    weighed = SOFT.model_copy(update={"row_weight": "agreement"})
    loss, _ = Objective([weighed])(student, {"big": teacher}, torch.tensor([3]))
    p, q = teacher.logits[[0, 2, 4]].softmax(-1), student.logits[[0, 2, 4]].softmax(-1)
    torch.testing.assert_close(loss, 2.0 * ((p * (p / q).log()).sum(-1) * torch.tensor([1.0, 0.5, 0.25])).sum() / 3)


def test_words_beyond_the_teachers_are_left_out_on_both_sides() -> None:
    """The student's head may be wider; a loss on hard labels sees all of it."""
    targets = [0, 0, 0]
    student, teacher = _signals(1, targets, vocabulary=10), _signals(2, targets, vocabulary=6)
    loss, means = Objective([LABEL, SOFT])(student, {"big": teacher}, torch.tensor([3, 3]))
    p, q = teacher.logits.softmax(-1), student.logits[:, :6].softmax(-1)
    torch.testing.assert_close(means["soft"], (p * (p / q).log()).sum() / 3)
    torch.testing.assert_close(means["label"], torch.nn.functional.cross_entropy(student.logits, student.token_ids))
    torch.testing.assert_close(loss, means["label"] + 2.0 * means["soft"])
