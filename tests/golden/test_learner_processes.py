"""Peers, and exits of one student, in one process and in two (torchrun, gloo, CPU): the same weights, the same logs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from distill_llm.models.load import LoadedModel

TRAINING = """
import sys
from pathlib import Path
import torch
from transformers import TrainerCallback
from distill_llm.core.processes import is_main_process, rank
from distill_llm.data.rows import Row
from distill_llm.losses.cross_entropy import CrossEntropy
from distill_llm.losses.forward_kl import ForwardKL
from distill_llm.models.load import LoadedModel, load_model, read_tokenizer
from distill_llm.models.peers import Peers
from distill_llm.objective import Objective, Term
from distill_llm.recipe.train import TrainSpec
from distill_llm.schemes.mutual import Mutual
from distill_llm.schemes.self_distill import SelfDistill
from distill_llm.training.train import fit, make_trainer

rows = []
for example in range(8):
    asked = [*range(5 + example, 8 + example + example % 4)]
    rows.append(Row(example, "label", asked, [6 + example, 1]))
    rows.append(Row(example, "rationale", asked, [*range(8, 12 + 3 * example), 1]))


class Keep(TrainerCallback):
    def on_log(self, *ignored, logs, **others):
        kept.append(logs)


for family in ("t5", "llama"):
    for kind in ("mutual", "exits"):
        model = load_model(f"{family}-1", where="test")
        tokenizer = read_tokenizer(f"{family}-1", where="test")
        if kind == "mutual":
            model = Peers({"peer_1": model, "peer_2": load_model(f"{family}-2", where="test")}, len(tokenizer))
        scheme = Mutual() if kind == "mutual" else SelfDistill(exits=(1,))
        teacher = "peers" if kind == "mutual" else "deepest"
        # A micro-batch of rationales alone has no token of the first two terms: DDP waits for all weights.
        terms = [Term(name="label", loss=CrossEntropy(), targets=("label",)),
                 Term(name="soft", loss=ForwardKL(temperature=2.0), targets=("label",), teacher=teacher),
                 Term(name="rationale", loss=CrossEntropy(), targets=("rationale",), weight=0.5)]
        spec = TrainSpec(max_steps=3, rows_per_step=8, rows_per_batch=2, validate_every=1, learning_rate=1e-2,
                         optimizer="adafactor", max_grad_norm=0.5)
        folder, kept = Path(sys.argv[1]) / f"{family}-{kind}", []
        trainer = make_trainer(LoadedModel(model, tokenizer), rows, spec=spec, max_steps=3, scheme=scheme,
                               objective=Objective(terms), teachers={},
                               validate=lambda model: {"accuracy": 0.5, "accuracy_peer_1": 0.2, "accuracy_peer_2": 0.5,
                                                       "accuracy_student": 0.5, "accuracy_exit_1": 0.4},
                               folder=folder, seed=3)
        trainer.add_callback(Keep())
        trained = fit(trainer, folder)
        torch.save(model.state_dict(), folder / f"weights-{rank()}.pt")
        if is_main_process():
            logs = [entry for entry in kept if "loss" in entry]
            torch.save({"logs": logs, "learner": trained.learner, "others": dict(trained.others)}, folder / "logs.pt")
"""


@pytest.mark.slow
def test_two_processes_train_what_one_process_trains(
    tiny_t5: Callable[..., LoadedModel],
    tiny_llama: Callable[..., LoadedModel],
    launch: Callable[..., Any],
    tmp_path: Path,
) -> None:
    for family, build, layers in (("t5", tiny_t5, "num_layers"), ("llama", tiny_llama, "num_hidden_layers")):
        for seed in (1, 2):
            made = build(seed=seed, **{layers: 2})
            made.model.save_pretrained(tmp_path / f"{family}-{seed}")
            made.tokenizer.save_pretrained(tmp_path / f"{family}-{seed}")
    (tmp_path / "training.py").write_text(TRAINING)
    for folder, processes in (("one", 0), ("two", 2)):
        launch("training.py", folder, processes=processes, CUDA_VISIBLE_DEVICES="")
    for name in ("t5-mutual", "t5-exits", "llama-mutual", "llama-exits"):
        one = torch.load(tmp_path / "one" / name / "weights-0.pt")
        for rank in (0, 1):
            other = torch.load(tmp_path / "two" / name / f"weights-{rank}.pt")
            for key, weight in one.items():
                torch.testing.assert_close(other[key], weight, atol=2e-5, rtol=0, msg=f"{name}, {rank}: {key}")
        logs, theirs = (torch.load(tmp_path / way / name / "logs.pt") for way in ("one", "two"))
        assert (logs["learner"], logs["others"]) == (theirs["learner"], theirs["others"])
        assert logs["learner"] == ("peer_2" if "mutual" in name else "student"), "the better one on validation"
        assert logs["others"] == ({"peer_1": 0.2} if "mutual" in name else {"exit_1": 0.4})
        for mine, other in zip(logs["logs"], theirs["logs"], strict=True):
            assert mine.keys() == other.keys()
            assert "agreement_soft_peer_2" in mine or "agreement_soft_exit_1" in mine
            for key in mine:
                assert other[key] == pytest.approx(mine[key], rel=1e-3, abs=1e-6), (name, key)
