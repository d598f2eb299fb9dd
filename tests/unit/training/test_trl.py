"""TRL's trainer, handed a recipe's models and rows: its loss against a formula in float64, and what it is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from distill_llm.core.errors import ConfigError
from distill_llm.data.rows import Row
from distill_llm.losses.base import Divergence
from distill_llm.losses.forward_kl import ForwardKL
from distill_llm.losses.jensen_shannon import JensenShannon
from distill_llm.losses.reverse_kl import ReverseKL
from distill_llm.objective import Term
from distill_llm.recipe.train import TrainSpec
from distill_llm.schemes.on_policy import OnPolicy, Rollouts
from distill_llm.schemes.trl_checks import mixture_of

pytest.importorskip("trl", reason="needs TRL: pip install 'distill-llm[trl]'")

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from distill_llm.models.load import LoadedModel

ROWS = [Row(example, "rationale", [9, 6, 7 + example, *range(20, 20 + example)], [10, 1]) for example in range(4)]


def _trainer(student: LoadedModel, teacher: Any, folder: Path, loss: Divergence, rows: list[Row] = ROWS) -> Any:
    from distill_llm.training.trl import make_trl_trainer

    return make_trl_trainer(
        student,
        rows,
        spec=TrainSpec(max_steps=2, rows_per_step=4, rows_per_batch=2, learning_rate=1e-2),
        max_steps=2,
        scheme=OnPolicy(student_fraction=1.0, engine="trl", temperature=2.0, max_new_tokens=5),
        term=Term(name="soft", loss=loss, targets=("rationale",), teacher="big", weight=0.7),
        teacher=teacher,
        validate=None,
        folder=folder,
        seed=3,
    )


def _logits(model: Any, inputs: dict[str, torch.Tensor], row: int) -> torch.Tensor:
    """Of each token that was written in a row, alone in a batch, softened."""
    prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
    own = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()]
    logits = model(input_ids=torch.cat([prompt, own])[None]).logits[0, len(prompt) - 1 : -1]
    return (logits / 2).log_softmax(-1)


LOSSES = (ReverseKL(temperature=2.0), ForwardKL(temperature=2.0), JensenShannon(temperature=2.0, mixture=0.3))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.kind)
def test_its_loss_is_the_term_s(tiny_llama: Callable[..., LoadedModel], tmp_path: Path, loss: Divergence) -> None:
    student, big = tiny_llama(seed=3), tiny_llama(seed=9)
    trainer = _trainer(student, big.model, tmp_path, loss)
    assert trainer.beta == mixture_of(loss)
    student.model.train()
    texts = [{"prompt": prompt} for prompt in trainer.train_dataset["prompt"]]
    inputs = trainer._prepare_inputs(texts)
    widths = inputs["prompt_mask"].sum(1).tolist()
    assert {tuple(ids[-width:]) for ids, width in zip(inputs["prompt_ids"].tolist(), widths, strict=True)} <= {
        tuple(row.input_ids) for row in ROWS
    }
    assert inputs["completion_ids"].size(1) <= 5
    found = trainer.compute_loss(student.model, inputs)
    count = int(inputs["num_items_in_batch"])
    model, teacher = student.model.double().eval(), big.model.double()
    total = torch.zeros((), dtype=torch.float64)
    for row in range(2):
        log_q, log_p = _logits(model, inputs, row), _logits(teacher, inputs, row)
        total = total + loss.between(log_p, log_q).sum()
    torch.testing.assert_close(found.double(), 0.7 * 4 * total / count, atol=1e-5, rtol=1e-4)


def test_it_trains_and_counts(tiny_llama: Callable[..., LoadedModel], tmp_path: Path) -> None:
    from distill_llm.training.train import fit

    student, before = tiny_llama(seed=3), tiny_llama(seed=3).model.state_dict()
    trained = fit(_trainer(student, tiny_llama(seed=9).model, tmp_path, ReverseKL(temperature=2.0)), tmp_path)
    assert (trained.steps, trained.tokens) == (2, 2 * sum(row.num_tokens for row in ROWS))
    assert any(not torch.equal(weight, before[name]) for name, weight in student.model.state_dict().items())
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_what_it_cannot_take_is_refused(tiny_llama: Callable[..., LoadedModel], tmp_path: Path) -> None:
    student = tiny_llama(seed=3)
    with pytest.raises(ConfigError, match="TRL compares them entry by entry"):
        _trainer(student, tiny_llama(vocab_size=700).model, tmp_path, ReverseKL(temperature=2.0))
    with pytest.raises(ConfigError, match="TRL leaves out a step that is not full"):
        _trainer(student, tiny_llama(seed=9).model, tmp_path, ReverseKL(temperature=2.0), ROWS[:3])


def test_vllm_is_told_how_to_write() -> None:
    from trl import DistillationConfig

    from distill_llm.training.trl import _rollouts

    on_gpu = _rollouts(Rollouts(gpu_memory_fraction=0.4, tensor_parallel_size=2))
    assert on_gpu["use_vllm"] is True
    assert _rollouts(Rollouts(mode="server", server="http://here:1"))["vllm_server_base_url"] == "http://here:1"
    assert set(on_gpu) | {"vllm_server_base_url"} <= set(DistillationConfig.__dataclass_fields__)
    assert _rollouts(None) == {}
