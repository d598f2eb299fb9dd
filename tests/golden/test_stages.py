"""Numerical identities of schemes with stages, on trained weights, to the byte; and their losses beside torch's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional
from transformers import set_seed

from distill_llm.core.errors import Interrupted
from distill_llm.data.collate import Collator
from distill_llm.data.rows import Row
from distill_llm.models.head import OutputHead
from distill_llm.objective import Objective
from distill_llm.pipeline.run import generate_rationales, train
from distill_llm.recipe.load import parse_yaml, recipe_from
from distill_llm.recipe.train import TrainSpec
from distill_llm.teachers.ensemble import EnsembleTeacher
from distill_llm.teachers.frozen import FrozenTeacher
from distill_llm.training.train import fit, make_trainer
from tests.conftest import SHOP_WORDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from distill_llm.models.load import LoadedModel

SIZES = {
    "t5": "{model_type: t5, d_model: 16, d_kv: 4, d_ff: 32, num_layers: 2, num_heads: 4, dropout_rate: 0.1}",
    "llama": "{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, "
    "num_attention_heads: 4}",
}
WIDER = {"t5": "{d_ff: 48}", "llama": "{intermediate_size: 48}"}
YAML = """
name: tiny
task: {kind: shop, products: 20, train_size: 16, validation_size: 2, test_size: 2}
rationales: {teacher: {kind: gold}}
student: {config: CONFIG, tokenizer: TEACHER}
teachers: {big: {kind: frozen, model: TEACHER}}
objective:
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
  - {name: soft, loss: {kind: forward_kl, temperature: 2}, targets: [label, rationale], teacher: big, weight: 0.5}
train:
  {optimizer: adafactor, learning_rate: 1.0e-2, max_steps: 4, rows_per_step: 8, rows_per_batch: 8, validate_every: 4}
evaluate: {controls: [], max_new_tokens: 2}
"""


@pytest.fixture(params=["t5", "llama"])
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., bytes]:
    """Trains an arm of the recipe with overrides, and gives the bytes of its weights."""
    family = request.param
    big = request.getfixturevalue(f"tiny_{family}")(seed=7, text=SHOP_WORDS)
    for part in (big.model, big.tokenizer):
        part.save_pretrained(tmp_path / "big")
    text = YAML.replace("CONFIG", SIZES[family]).replace("TEACHER", str(tmp_path / "big"))

    def run(name: str, *overrides: str, arm: str = "student") -> bytes:
        wanted = [override.replace("WIDER", WIDER[family]) for override in overrides]
        recipe = recipe_from(parse_yaml(text, "tiny"), [f"run_dir={tmp_path / name}", *wanted])
        generate_rationales(recipe)
        return (train(recipe, arms=[arm]).model(arm) / "model.safetensors").read_bytes()

    return run


CHAIN = "scheme={{kind: assistant_chain, teacher: big, guidance: {}}}"
ASSISTANT = "scheme.assistants=[{name: wide, config: WIDER}]"


def test_chains_are_what_they_claim_to_be_to_the_byte(trained: Callable[..., bytes]) -> None:
    direct = trained("direct")
    for guidance in ("nearest", "dense", "ensemble"):
        assert trained(f"none-{guidance}", CHAIN.format(guidance)) == direct, "without assistants: direct distillation"
    below_one = {
        guidance: trained(guidance, CHAIN.format(guidance), ASSISTANT, *more, arm="wide")
        for guidance, more in {"nearest": [], "dense": ["scheme.drop=0.5"], "ensemble": []}.items()
    }
    assert len(set(below_one.values())) == 1, "below one model, all guidances are the same"
    students = {guidance: trained(guidance, CHAIN.format(guidance), ASSISTANT) for guidance in ("nearest", "ensemble")}
    assert len({direct, *students.values()}) == 3, "below two they differ, from each other and from no assistant"


def test_the_first_generation_is_the_plain_training_of_its_seed(trained: Callable[..., bytes]) -> None:
    born = ("scheme={kind: born_again, generations: 2}",)
    assert trained("born", *born, arm="generation_0") == trained("plain", "seed=18")
    assert trained("born", *born) not in (trained("plain", "seed=18"), trained("own"))


def test_hints_leave_the_upper_half_as_it_was(trained: Callable[..., bytes], tmp_path: Path) -> None:
    """And what comes after starts from their weights: without a step of its own, it would be them."""
    from safetensors.torch import load

    objective = (
        "objective=[{name: label, loss: {kind: cross_entropy}, targets: [label]}, "
        "{name: hint, loss: {kind: hint, layers: uniform}, targets: [label, rationale], teacher: big}]"
    )
    overrides = (objective, "scheme={kind: hint_first, share_of_steps: 0.5}")
    hints = load(trained("hints", *overrides, arm="hints"))
    fresh = load(trained("fresh", "train.learning_rate=1e-30"))
    moved = {name for name, weight in hints.items() if not torch.equal(weight, fresh[name])}
    assert moved
    lower = ("decoder.block.0.", "encoder.", "shared.", "model.layers.0.", "model.embed_tokens.")
    assert {name for name in moved if not name.startswith(lower)} == set(), "the second layer and the head have no hint"
    still = load(trained("still", *overrides, "train.tune=[1e-30]", "train.learning_rate=1e-2"))
    assert all(torch.equal(still[name], hints[name]) for name in hints)


ROWS = [
    Row(n, target, [5, 6, 7 + n], [8 + n % 3, 1, *range(10, 10 + n % 4), 1])
    for n in range(8)
    for target in ("label", "rationale")
]


def _stage(guidance: str, drop: float = 0.0) -> Any:
    text = YAML.replace("CONFIG", SIZES["t5"]).replace("TEACHER", "a/b")
    more = ["scheme.assistants=[{name: wide, config: {d_ff: 48}}, {name: less, config: {d_ff: 40}}]"]
    recipe = recipe_from(parse_yaml(text, "tiny"), [CHAIN.format(guidance), *more, f"scheme.drop={drop}"])
    return recipe.stages[-1]


def _models(make: Callable[..., LoadedModel]) -> dict[str, Any]:
    return {name: make(seed=seed).model for name, seed in (("big", 5), ("wide", 6), ("less", 7))}


def _teachers(make: Callable[..., LoadedModel]) -> dict[str, FrozenTeacher]:
    width = len(make().tokenizer)
    return {name: FrozenTeacher(model, width) for name, model in _models(make).items()}


@pytest.mark.parametrize("chunked", [True, False])
def test_dense_is_the_mean_of_the_divergences_from_all_above(
    tiny_model: Callable[..., LoadedModel], chunked: bool
) -> None:
    """Son et al. 2021 sum (1 - w) CE + w KD over the models above; here over their number, beside torch's kl_div."""
    student, teachers = tiny_model(seed=1), _teachers(tiny_model)
    batch = _collator(student)(ROWS)
    stage = _stage("dense")
    objective = Objective(stage.terms).at(0.0)
    head = OutputHead(student.model, chunk_tokens=3) if chunked else None
    ((said, taught),) = stage.scheme.compare(student.model, teachers, batch, objective, head)
    loss, _ = objective(said, taught, objective.counts(batch))
    mine = _log_probabilities(student.model, batch)
    own = _collator(student)([row for row in ROWS if row.target == "label"])
    labels = functional.nll_loss(_log_probabilities(student.model, own), _tokens(own))
    apart = [
        functional.kl_div(
            _log_probabilities(student.model, batch, 2.0),
            _log_probabilities(teacher, batch, 2.0),
            reduction="batchmean",
            log_target=True,
        )
        * 4
        for teacher in _models(tiny_model).values()
    ]
    assert len(mine) == len(_tokens(batch))
    torch.testing.assert_close(loss.double(), labels + 0.5 * sum(apart) / 3, atol=1e-5, rtol=1e-5)


def test_an_ensemble_of_one_is_that_teacher(tiny_model: Callable[..., LoadedModel]) -> None:
    teacher = _teachers(tiny_model)["big"]
    batch = _collator(tiny_model())(ROWS)
    width = len(tiny_model().tokenizer)
    one = EnsembleTeacher([teacher], [1.0], mean="probabilities", by="fixed", width=width).signals(batch)
    assert torch.equal(one.logits, teacher.signals(batch).narrowed(width).logits), "to the bit"


def _train(make: Callable[..., LoadedModel], folder: Path, rows_per_batch: int = 8, stop_at: int = 0) -> dict[str, Any]:
    student, stage = make(seed=1), _stage("dense", drop=0.5)
    set_seed(17)
    spec = TrainSpec(max_steps=6, rows_per_step=8, rows_per_batch=rows_per_batch, learning_rate=1e-2, validate_every=2)
    trainer = make_trainer(
        student,
        ROWS,
        spec=spec,
        max_steps=6,
        scheme=stage.scheme,
        objective=Objective(stage.terms),
        teachers=_teachers(make),
        validate=None,
        folder=folder,
        seed=17,
    )
    steps = iter(range(1, 100))
    fit(trainer, folder, stop_when=lambda: next(steps) == stop_at)
    logs = [
        {key: value for key, value in log.items() if key.startswith("loss_soft")} for log in trainer.state.log_history
    ]
    assert {key for log in logs for key in log} == {"loss_soft_big", "loss_soft_wide", "loss_soft_less"}
    return {name: weight.detach().clone() for name, weight in student.model.state_dict().items()}


def test_dropped_teachers_are_the_same_after_a_resume(tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    whole = _train(tiny_model, tmp_path / "whole")
    with pytest.raises(Interrupted):
        _train(tiny_model, tmp_path / "parts", stop_at=3)
    parts = _train(tiny_model, tmp_path / "parts")
    assert all(torch.equal(parts[name], weight) for name, weight in whole.items())


def test_dropped_teachers_do_not_depend_on_the_cut(tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    whole = _train(tiny_model, tmp_path / "8")
    for rows in (4, 2, 1):
        parts = _train(tiny_model, tmp_path / str(rows), rows)
        for name, weight in whole.items():
            torch.testing.assert_close(parts[name], weight, atol=2e-4, rtol=2e-4)


def _collator(student: LoadedModel) -> Collator:
    start = student.model.config.decoder_start_token_id if student.is_encoder_decoder else None
    return Collator(student.tokenizer.pad_token_id, start)


def _tokens(batch: Any) -> torch.Tensor:
    labels = batch["labels"] if "decoder_input_ids" in batch else batch["labels"][:, 1:]
    return labels[labels != -100]


def _log_probabilities(model: Any, batch: Any, temperature: float = 1.0) -> torch.Tensor:
    """At the supervised tokens, by the model's own forward pass, in float64."""
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    with torch.no_grad():
        logits = model(**{name: batch[name] for name in names if name in batch}).logits
    labels = batch["labels"]
    if "decoder_input_ids" not in batch:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return (logits[labels != -100].double() / temperature).log_softmax(-1)
