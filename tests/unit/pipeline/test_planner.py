"""Plans of small recipes, beside what their models, optimisers and tensors take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill_llm.core.errors import ConfigError
from distill_llm.models.load import build_student
from distill_llm.pipeline.memory_model import Work
from distill_llm.pipeline.place import machine_of, parse_bytes, simulated_device
from distill_llm.pipeline.plan_advice import advise
from distill_llm.pipeline.planner import BASELINE, Ground, Memories, Plan, memories_of, prepare
from distill_llm.pipeline.time_model import UTILISATION, of_sheet
from distill_llm.recipe.recipe import Recipe

EvenRecipe = Callable[..., Recipe]
BASE = 1000


def _plan(recipe: Recipe, folder: Path, device: str = "cpu") -> tuple[Memories, Ground]:
    ground = prepare(recipe, folder, device, baseline=BASE)
    return memories_of(recipe, ground), ground


def test_parts_by_hand(even: EvenRecipe, tmp_path: Path) -> None:
    """Of AdamW in float32, accumulating: four bytes a weight and gradient, eight of states; all logits of the batch."""
    recipe = even(
        "rationales=null",
        "objective=[{name: label, loss: {kind: cross_entropy}, targets: [label]}]",
        "train.rows_per_batch=4",
        "train.chunk_tokens=0",
        "train.precision=float32",
    )
    memories, ground = _plan(recipe, tmp_path)
    (stage,) = memories.stages
    student = build_student(recipe.student, ground.rows.tokenizer)
    number = student.num_parameters
    parts = stage.costs.memory.parts
    assert stage.costs.parameters == stage.costs.learned == number
    assert parts["weights"] == 4 * number
    assert parts["gradients"] == 4 * number
    assert parts["states"] == pytest.approx(8 * number, rel=1e-3)
    rows, read, written = stage.costs.largest_batch
    assert rows == 4
    assert stage.costs.batches_a_step == 2
    words = student.model.get_output_embeddings().weight.size(0)
    assert parts["logits"] >= 4 * rows * written * words
    assert parts["activations"] > 4 * rows * (read + written) * 8  # each layer keeps more than its input
    trained = next(moment for moment in memories.moments if moment.name == "student is trained")
    assert trained.total == BASE + stage.costs.memory.total
    assert trained.parts[BASELINE] == BASE
    assert not any(recipe.folder.glob("**/*.safetensors"))


def test_where_nothing_accumulates_gradients_are_not_there_at_the_loss(even: EvenRecipe, tmp_path: Path) -> None:
    recipe = even("rationales=null", "objective=[{name: label, loss: {kind: cross_entropy}, targets: [label]}]")
    memories, _ = _plan(recipe, tmp_path)
    (stage,) = memories.stages
    assert stage.costs.batches_a_step == 1
    assert stage.costs.memory.parts.get("gradients", 0) < 4 * stage.costs.parameters


@pytest.mark.parametrize("cached", [False, True])
def test_a_teacher_is_there_or_on_disk(even: EvenRecipe, tmp_path: Path, tiny_t5: Any, cached: bool) -> None:
    words = " ".join(["predict: explain: is even ? yes no", *map(str, range(40))])
    big = tiny_t5(text=words, seed=1, d_model=24)
    big.model.save_pretrained(tmp_path / "big")
    big.tokenizer.save_pretrained(tmp_path / "big")
    frozen = f"{{kind: frozen, model: {tmp_path / 'big'}}}"
    teachers = f"{{live: {frozen}, big: {{kind: cached, of: live}}}}" if cached else f"{{big: {frozen}}}"
    recipe = even(
        "rationales=null",
        f"student.tokenizer={tmp_path / 'big'}",
        f"teachers={teachers}",
        "objective=[{name: soft, loss: {kind: forward_kl}, targets: [label], teacher: big}]",
    )
    memories, _ = _plan(recipe, tmp_path)
    moments = {moment.name: moment for moment in memories.moments}
    beside = moments["student is trained"].parts.get("teachers", 0)
    assert beside == (0 if cached else 4 * big.num_parameters)
    if cached:
        assert moments["signals of big are written"].parts["teachers"] == 4 * big.num_parameters


def test_advice_is_planned_and_helps(even: EvenRecipe, tmp_path: Path) -> None:
    """Each override is what a plan of the recipe with it says, and the peak is lower."""

    def load(more: Any) -> Recipe:
        label = "objective=[{name: label, loss: {kind: cross_entropy}, targets: [label]}]"
        return even("rationales=null", label, "evaluate.max_new_tokens=2", "student.config.d_ff=256", *more)

    recipe = load(())
    memories, ground = _plan(recipe, tmp_path)
    peak = memories.peak.total
    plan = Plan(recipe, "cpu", of_sheet("t4"), round(0.9 * peak), "a test", ground.rows, memories, {}, 1, None, {})
    found = advise(plan, ground, load)
    assert any(one.overrides == ("train.rows_per_batch=4",) for one in found)
    assert all(one.peak < peak for one in found)
    for one in found:
        assert one.fits == (one.peak <= plan.limit)
    tried = next(one for one in found if one.overrides == ("train.rows_per_batch=2",))
    assert tried.peak == memories_of(load(tried.overrides), ground).peak.total


def test_a_gpu_keeps_no_attention_weights(even: EvenRecipe, tmp_path: Path) -> None:
    """And no gaps: its allocator is another."""
    recipe = even("rationales=null", "objective=[{name: label, loss: {kind: cross_entropy}, targets: [label]}]")
    on_cpu, _ = _plan(recipe, tmp_path)
    on_gpu, _ = _plan(recipe, tmp_path, "cuda")
    parts = [one.stages[0].costs.memory.parts for one in (on_cpu, on_gpu)]
    assert parts[1]["weights"] == parts[0]["weights"]
    assert parts[1]["activations"] < parts[0]["activations"]
    assert "gaps between tensors" not in parts[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("16GiB", 16 * 2**30), ("24GB", 24 * 10**9), ("1.5 MiB", 3 * 2**19), ("800m", 800 * 10**6), ("4096", 4096)],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text, where="--memory") == expected


@pytest.mark.parametrize("text", ["", "much", "-1GB", "16 GiBs", "0", "12iB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="--memory"):
        parse_bytes(text, where="--memory")


def test_devices() -> None:
    assert simulated_device("cpu") == "cpu"
    assert simulated_device("a100") == "cuda"
    with pytest.raises(ConfigError, match="a100"):
        simulated_device("abacus")
    with pytest.raises(ConfigError, match="no GPU here"):
        machine_of("cuda")


def test_seconds_of_a_data_sheet() -> None:
    """An A100's 312 TFLOPS and 2,039 GB/s, at the share that is assumed."""
    machine = of_sheet("a100")
    work = Work(flops=312e12, moved=2039e9, calls=0)
    assert machine.seconds(work, bfloat16=True) == pytest.approx(2 / UTILISATION)
