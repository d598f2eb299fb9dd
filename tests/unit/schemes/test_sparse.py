"""Zeros among a student's weights: where torch's own pruner puts them, more from step to step, all in the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch.ao.pruning import WeightNormSparsifier
from transformers import TrainerCallback, set_seed

from distill_llm.core.errors import ConfigError, Interrupted
from distill_llm.data.rows import Row
from distill_llm.losses.cross_entropy import CrossEntropy
from distill_llm.models.load import load_model
from distill_llm.models.sparse import check_sparse, make_zeros, sparse_layers
from distill_llm.models.spec import StudentSpec
from distill_llm.objective import Objective, Term
from distill_llm.recipe.load import parse_yaml, recipe_from
from distill_llm.recipe.train import TrainSpec
from distill_llm.schemes.sparse import Sparse
from distill_llm.training.train import fit, make_trainer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from distill_llm.models.load import LoadedModel
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
]
YAML = """
name: tiny
task: {kind: shop, products: 20, train_size: 32, validation_size: 8, test_size: 8}
rationales: {teacher: {kind: gold}}
student:
  config: {model_type: t5, d_model: 16, d_kv: 4, d_ff: 32, num_layers: 1, num_heads: 4}
  tokenizer: {kind: words, vocab_size: 256}
scheme: {kind: sparse}
objective:
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
train: {max_steps: 10, rows_per_step: 8, rows_per_batch: 8}
"""


def _trainer(
    student: LoadedModel, folder: Path, scheme: Sparse, *, validate: Any = None, **keys: Any
) -> DistillTrainer:
    spec = {"max_steps": 8, "rows_per_step": 8, "rows_per_batch": 8, "learning_rate": 1e-2, "validate_every": 2} | keys
    set_seed(3)
    return make_trainer(
        scheme.assemble(student, StudentSpec(model="a/b"), 3),
        ROWS,
        spec=TrainSpec.model_validate(spec),
        max_steps=8,
        scheme=scheme,
        objective=Objective(TERMS),
        teachers={},
        validate=validate,
        folder=folder,
        seed=3,
    )


def _zeros(model: Any) -> dict[str, torch.Tensor]:
    return {name: part.weight.detach() == 0 for name, part in sparse_layers(model, "unstructured", where="x").items()}


def _share(zeros: dict[str, torch.Tensor]) -> float:
    return sum(int(one.sum()) for one in zeros.values()) / sum(one.numel() for one in zeros.values())


class _Watch(TrainerCallback):
    """Where the zeros are in each step, and their share."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.where: list[dict[str, torch.Tensor]] = []

    def on_step_begin(self, *_: Any, model: Any, **__: Any) -> None:
        self.where.append({name: zeros.clone() for name, zeros in _zeros(model).items()})
        self.seen.append(
            sum(int(z.sum()) for z in self.where[-1].values()) / sum(z.numel() for z in self.where[-1].values())
        )


@pytest.mark.parametrize(("pattern", "block"), [("unstructured", (1, 1)), ("2:4", (1, 4))])
def test_zeros_are_where_torch_would_put_them(
    pattern: Any, block: tuple[int, int], tiny_llama: Callable[..., LoadedModel]
) -> None:
    model = tiny_llama(seed=4).model
    layers = sparse_layers(model, pattern, where="x")
    share, zeros_per_block = (0.375, 1) if pattern == "unstructured" else (1.0, 2)
    theirs = WeightNormSparsifier(sparsity_level=share, sparse_block_shape=block, zeros_per_block=zeros_per_block)
    other = tiny_llama(seed=4).model
    theirs.prepare(other, [{"tensor_fqn": f"{name}.weight"} for name in layers])
    theirs.step()
    make_zeros(layers, pattern, share)
    for name, part in layers.items():
        mask = other.get_submodule(name).parametrizations["weight"][0].mask  # pyright: ignore[reportIndexIssue]
        assert torch.equal(part.weight != 0, mask.bool()), name


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_zeros_come_as_the_paper_says_and_stay_without_momentum(
    pattern: Any, optimizer: str, tiny_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    scheme, watch, student = Sparse(pattern=pattern), _Watch(), tiny_model(seed=1)
    trainer = _trainer(student, tmp_path, scheme, optimizer=optimizer)
    trainer.add_callback(watch)
    fit(trainer, tmp_path)
    wanted = [0.5 * (1 - (1 - min(1.0, step / 4)) ** 3) for step in range(8)]
    assert watch.seen == pytest.approx(wanted, abs=0.02)
    for before, after in zip(watch.where, watch.where[1:], strict=False) if optimizer == "adafactor" else ():
        assert all(bool((after[name] | ~before[name]).all()) for name in before), "a zero came back"
    saved = load_model(str(tmp_path / "model"), where="x")
    for name, part in sparse_layers(saved, pattern, where="x").items():
        zeros = part.weight == 0
        assert int(zeros.sum()) == part.weight.numel() // 2, name
        if pattern == "2:4":
            assert bool((zeros.view(-1, 4).sum(1) == 2).all()), name
    head = saved.get_output_embeddings().weight
    assert int((head == 0).sum()) == 0


def test_a_resumed_training_is_the_whole_one_to_the_bit(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """Stopped while zeros come: the checkpoint has no masks, only zeros."""
    scheme = Sparse(sparsity=0.75)
    fit(_trainer(tiny_t5(seed=1), tmp_path / "whole", scheme), tmp_path / "whole")
    asked: list[int] = []

    def after_two() -> bool:
        asked.append(0)
        return len(asked) > 2

    cut = tmp_path / "cut"
    with pytest.raises(Interrupted):
        fit(_trainer(tiny_t5(seed=1), cut, scheme), cut, stop_when=after_two)
    fit(_trainer(tiny_t5(seed=1), cut, scheme), cut)
    one, two = (load_file(folder / "model/model.safetensors") for folder in (tmp_path / "whole", cut))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_validation_sees_all_zeros_before_they_have_come(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    seen: list[float] = []
    scheme = Sparse(until=0.9)

    def validate(model: Any) -> dict[str, float]:
        for _, one in scheme.each(model):
            seen.append(_share(_zeros(one)))
        return {"accuracy": len(seen) / 10}

    trainer = _trainer(tiny_t5(seed=1), tmp_path, scheme, validate=validate)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trainer.evaluate()
    assert all(torch.equal(before[name], weight) for name, weight in trainer.model.state_dict().items())
    trainer.train()
    assert seen == pytest.approx([0.5] * len(seen))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (['scheme={kind: sparse, pattern: "2:4", sparsity: 0.6}'], "has a sparsity of 0.5; it is 0.6"),
        (["student={model: a/b, lora: {rank: 4}}"], "fill them"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe_from(parse_yaml(YAML, "tiny"), overrides)


def test_widths_that_are_no_groups_of_four_and_layers_of_another_kind_are_refused() -> None:
    sizes = {"model_type": "t5", "d_model": 18, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    spec = {"config": sizes, "tokenizer": {"kind": "words"}}
    with pytest.raises(ConfigError, match=r"scheme\.pattern: \S+ reads 18 numbers"):
        check_sparse(StudentSpec.model_validate(spec), "2:4", where="scheme")
    check_sparse(StudentSpec.model_validate(spec), "unstructured", where="scheme")
    other = spec | {"config": {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}}
    with pytest.raises(ConfigError, match="no linear layer whose weights could be zero"):
        check_sparse(StudentSpec.model_validate(other), "unstructured", where="scheme")


def test_the_stage_says_how_much_is_zero() -> None:
    (stage,) = recipe_from(parse_yaml(YAML, "tiny"), ["scheme.sparsity=0.8"]).stages
    assert stage.description == "label; 80% of linear weights zero"
