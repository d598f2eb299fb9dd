"""Diagnostics: what the logs say of each term, beside numbers worked out row by row, without padding and by formula."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import TrainerCallback, set_seed

from distill_llm.core.signals import Signals
from distill_llm.core.sparse import TopSignals
from distill_llm.data.rows import Row
from distill_llm.losses.cross_entropy import CrossEntropy
from distill_llm.losses.forward_kl import ForwardKL
from distill_llm.losses.universal_logit import UniversalLogit
from distill_llm.objective import Objective, Term
from distill_llm.recipe.train import TrainSpec
from distill_llm.schemes.step_by_step import StepByStep
from distill_llm.teachers.frozen import FrozenTeacher
from distill_llm.training.diagnostics import Diagnostics
from distill_llm.training.train import make_trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from distill_llm.models.load import LoadedModel

ROWS = [
    row
    for example in range(4)
    for row in (
        Row(example, "label", [5, 6, 7 + example], [8 + example % 3, 1]),
        Row(example, "rationale", [9, 6, 7 + example], [*range(10, 14 + example), 1]),
    )
]
LABEL = Term(name="label", loss=CrossEntropy(), targets=("label",))
RATIONALE = Term(name="rationale", loss=CrossEntropy(), targets=("rationale",), weight=0.5)
SOFT = Term(name="soft", loss=ForwardKL(temperature=2.0), targets=("rationale",), teacher="big", weight=3.0)
NAMES = ("tokens", "agreement", "teacher_entropy", "gradient_share")


class Logged(TrainerCallback):
    """Keeps what reporters get."""

    def __init__(self) -> None:
        self.entries: list[dict[str, float]] = []

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.entries.append(dict(logs))


def _logs(
    student: LoadedModel, teacher: LoadedModel, folder: Path, terms: Sequence[Term], *, steps: int = 1, **spec: Any
) -> list[dict[str, float]]:
    keys = {"max_steps": steps, "rows_per_step": 8, "rows_per_batch": 2, "learning_rate": 1e-2, "validate_every": 1}
    set_seed(17)
    trainer = make_trainer(
        student,
        ROWS,
        spec=TrainSpec.model_validate(keys | spec),
        max_steps=steps,
        scheme=StepByStep(),
        objective=Objective(terms),
        teachers={"big": FrozenTeacher(teacher.model)},
        validate=None,
        folder=folder,
        seed=17,
    )
    logged = Logged()
    trainer.add_callback(logged)
    trainer.train()
    return logged.entries


def _said(model: LoadedModel, target: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and tokens of a target's rows, each row run alone."""
    logits, tokens = [], []
    net = copy.deepcopy(model.model).eval()
    with torch.no_grad():
        for row in (row for row in ROWS if row.target == target):
            labels = torch.tensor([list(row.label_ids)])
            if model.is_encoder_decoder:
                said = net(input_ids=torch.tensor([list(row.input_ids)]), labels=labels).logits
            else:
                text = torch.tensor([[*row.input_ids, *row.label_ids]])
                said = net(input_ids=text).logits[:, len(row.input_ids) - 1 : -1]
            logits.append(said[0])
            tokens.append(labels[0])
    return torch.cat(logits).double(), torch.cat(tokens)


def _hard_gradient(logits: torch.Tensor, tokens: torch.Tensor, weight: float) -> float:
    """Norm of weight * (softmax - one-hot) / tokens."""
    gradient = logits.softmax(-1) - torch.nn.functional.one_hot(tokens, logits.size(-1))
    return weight * float(gradient.norm()) / len(tokens)


@pytest.mark.parametrize("chunk_tokens", ["auto", 3, 0])
def test_the_logs_say_what_a_look_at_each_row_says(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path, chunk_tokens: int | str
) -> None:
    """Four micro-batches, with and without chunks: the same as eight rows one by one."""
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    (short, label_ids), (mine, rationale_ids) = _said(student, "label"), _said(student, "rationale")
    big, _ = _said(teacher, "rationale")
    (logs,) = _logs(student, teacher, tmp_path, [LABEL, RATIONALE, SOFT], chunk_tokens=chunk_tokens)

    assert (logs["tokens_label"], logs["tokens_rationale"], logs["tokens_soft"]) == (8, 26, 26)
    same = (mine.argmax(-1) == big.argmax(-1)).double().mean().item()
    assert logs["agreement_soft"] == pytest.approx(same, abs=1e-6)
    p = big.softmax(-1)
    assert logs["teacher_entropy_soft"] == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-4)
    # The gradient of T^2 * KL(p || q) with respect to the logits is T * (q - p).
    moved = 2.0 * ((mine / 2).softmax(-1) - (big / 2).softmax(-1))
    norms = {
        "label": _hard_gradient(short, label_ids, 1.0),
        "rationale": _hard_gradient(mine, rationale_ids, 0.5),
        "soft": 3.0 * float(moved.norm()) / len(rationale_ids),
    }
    for name, norm in norms.items():
        assert logs[f"gradient_share_{name}"] == pytest.approx(norm / sum(norms.values()), rel=1e-4), name
    assert not {f"{number}_{name}" for number in NAMES[1:3] for name in ("label", "rationale")} & set(logs)


def test_a_teacher_that_is_the_student_agrees_with_it(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """And a term that has nothing to say has no share of the gradient."""
    (logs,) = _logs(tiny_t5(seed=1), tiny_t5(seed=1), tmp_path, [LABEL, SOFT])
    assert logs["agreement_soft"] == 1
    assert logs["gradient_share_soft"] < 1e-5
    assert logs["gradient_share_label"] == pytest.approx(1)


def test_tokens_are_those_since_the_last_log_and_terms_that_ended_are_silent(
    tiny_t5: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    """Each step is an epoch: 8 tokens of labels. The soft term takes part in the first of two steps a log."""
    ending = SOFT.model_copy(update={"until": 0.25})
    first, second = _logs(
        tiny_t5(seed=1), tiny_t5(seed=2), tmp_path, [LABEL, RATIONALE, ending], steps=4, validate_every=2
    )
    assert (first["tokens_label"], first["tokens_rationale"], first["tokens_soft"]) == (16, 52, 26)
    assert (second["tokens_label"], second["tokens_rationale"]) == (16, 52)
    assert "agreement_soft" not in first, "the step that was looked at had no such term"
    assert not [name for name in second if name.endswith("_soft")]
    for logs in (first, second):
        assert logs["gradient_share_label"] + logs["gradient_share_rationale"] == pytest.approx(1)


def test_diagnostics_change_nothing_and_can_be_left_out(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """The same weights to the bit, with dropout, which a further draw of random numbers would change."""
    teacher, after = tiny_t5(seed=2), []
    for diagnostics in (True, False):
        student = tiny_t5(seed=1, dropout_rate=0.2)
        logs = _logs(
            student,
            teacher,
            tmp_path / str(diagnostics),
            [LABEL, RATIONALE, SOFT],
            steps=3,
            diagnostics=diagnostics,
        )
        assert len(logs) == 3
        found = [name for entry in logs for name in entry if name.startswith(NAMES)]
        assert bool(found) == diagnostics
        after.append(student.model.state_dict())
    assert all(torch.equal(weight, after[1][name]) for name, weight in after[0].items())


def _signals(logits: list[list[float]]) -> Signals:
    zeros = torch.zeros(len(logits), dtype=torch.long)
    return Signals(torch.tensor(logits), zeros, zeros)


def _looked_at(student: Signals, teacher: Signals) -> dict[str, float]:
    diagnostics = Diagnostics()
    watch = diagnostics.begin([SOFT], torch.tensor([len(student.token_ids)]), closely=True)
    assert watch is not None
    watch(SOFT, student, teacher, torch.tensor(0.0))
    return diagnostics.values(lambda sums: sums)


def test_words_that_the_teacher_does_not_have_are_not_asked_about() -> None:
    """The student's head is padded to four words, and likes the padding best."""
    student = _signals([[0.0, 2.0, 1.0, 9.0], [3.0, 2.0, 1.0, 9.0]])
    logs = _looked_at(student, _signals([[0.0, 5.0, 0.0], [0.0, 5.0, 0.0]]))
    assert logs["agreement_soft"] == 0.5


def test_words_of_no_probability_add_nothing_to_the_entropy() -> None:
    """Two equal words and one that is masked: the logarithm of two."""
    never = float("-inf")
    logs = _looked_at(_signals([[0.0, 0.0, 0.0]]), _signals([[1.0, 1.0, never]]))
    assert logs["teacher_entropy_soft"] == pytest.approx(0.693147, abs=1e-6)
    assert "gradient_share_soft" not in logs, "one term has no share"


def test_tokens_that_a_teacher_knows_nothing_of_are_not_asked_about() -> None:
    student = _signals([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 1.0, 0.0]])
    teacher = _signals([[0.0, 5.0, 0.0], [0.0, 5.0, 0.0], [90.0, 0.0, 0.0]])
    assert _looked_at(student, teacher)["agreement_soft"] == pytest.approx(1 / 3)
    logs = _looked_at(student, replace(teacher, known=torch.tensor([True, True, False])))
    assert logs["agreement_soft"] == 0.5
    assert logs["teacher_entropy_soft"] == pytest.approx(
        _looked_at(student.part(0, 2), teacher.part(0, 2))["teacher_entropy_soft"]
    )


def test_words_that_mean_nothing_are_not_counted() -> None:
    student = _signals([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 1.0, 0.0]])
    none, probs = torch.zeros(3, dtype=torch.long), torch.tensor([[0.5, 0.25], [0.5, 0.25], [0.1, 0.1]])
    kept = (torch.tensor([[1, 0], [1, 0], [0, 1]]), probs.log(), torch.zeros(3, 1))
    teacher = TopSignals(none, none, 3, (1.0,), *kept, known=torch.tensor([True, True, False]))
    logs = _looked_at(student, teacher)
    assert logs["agreement_soft"] == 0.5
    assert logs["captured_mass_soft"] == pytest.approx(0.75)


def test_nobody_agrees_on_words_of_another_tokenizer() -> None:
    term = SOFT.model_copy(update={"loss": UniversalLogit()})
    diagnostics = Diagnostics()
    watch = diagnostics.begin([term], torch.tensor([1]), closely=True)
    assert watch is not None
    watch(term, _signals([[0.0, 2.0]]), _signals([[0.0, 2.0, 1.0]]), torch.tensor(0.0))
    logs = diagnostics.values(lambda sums: sums)
    assert "agreement_soft" not in logs
    assert logs["teacher_entropy_soft"] > 0


def test_a_step_that_is_not_logged_is_not_watched() -> None:
    diagnostics = Diagnostics()
    assert diagnostics.begin([LABEL, SOFT], torch.tensor([3, 4]), closely=False) is None
    assert diagnostics.begin([LABEL], torch.tensor([5]), closely=False) is None
    assert diagnostics.values(lambda sums: sums) == {"tokens_label": 8, "tokens_soft": 4}
    assert diagnostics.values(lambda sums: sums) == {}


def test_only_logged_steps_are_looked_at_closely(
    tiny_t5: Callable[..., LoadedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A close look costs time."""
    watched, begin = [], Diagnostics.begin

    def noted(self: Diagnostics, *given: Any, closely: bool) -> Any:
        watched.append(closely)
        return begin(self, *given, closely=closely)

    monkeypatch.setattr(Diagnostics, "begin", noted)
    _logs(tiny_t5(seed=1), tiny_t5(seed=2), tmp_path, [LABEL, SOFT], steps=6, validate_every=3)
    assert watched == [False, False, True] * 2
