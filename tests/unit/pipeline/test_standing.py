"""Teachers of soft labels that cannot be had: refused, or left out of an ensemble that says so, for a whole run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill_llm.core.errors import ConfigError
from distill_llm.core.files import read_json
from distill_llm.pipeline.doctor import examine
from distill_llm.pipeline.rationale_stage import check
from distill_llm.pipeline.run import run as run_all
from distill_llm.pipeline.run import train
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.pipeline.standing import failing_teachers, without
from distill_llm.recipe.recipe import Recipe
from distill_llm.teachers.ensemble import Ensemble

TEXT = "is 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 even ? yes no twice . The answer predict explain :"


@pytest.fixture
def soft(tmp_path: Path, even: Any, tiny_t5: Any) -> Callable[..., Recipe]:
    """A recipe of labels from an ensemble of a and b: ``soft("teachers.both.drop_failing=true", run="other")``."""
    for seed, name in enumerate("ab"):
        made = tiny_t5(seed=seed, text=TEXT)
        made.model.save_pretrained(tmp_path / name)
        made.tokenizer.save_pretrained(tmp_path / name)
    made.tokenizer.save_pretrained(tmp_path / "words")

    def build(*overrides: str, run: str = "run") -> Recipe:
        folders = {name: f"{{kind: frozen, model: {tmp_path}/{name}}}" for name in "ab"}
        return even(
            f"student.tokenizer={tmp_path}/words",
            f"teachers={{a: {folders['a']}, b: {folders['b']}, both: {{kind: ensemble, of: [a, b], weights: [3, 1]}}}}",
            "objective=[{name: soft, loss: {kind: forward_kl}, targets: [label], teacher: both}]",
            "rationales=null",
            "evaluate={controls: [], resamples: 100, max_new_tokens: 2}",
            *overrides,
            run=run,
        )

    return build


DROPS = "teachers.both.drop_failing=true"


def _weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    return load_file(RunFolder(recipe.folder).model("student") / "model.safetensors")


def test_one_that_is_gone_is_refused_unless_the_ensemble_drops_it(soft: Any, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(ConfigError, match=f"frozen '{tmp_path}/b'"):
        check(soft())
    check(soft(DROPS))
    assert list(failing_teachers(soft(DROPS))) == ["b"]
    alone = without(soft(DROPS), ["b"])
    both = alone.teachers["both"]
    assert isinstance(both, Ensemble)
    assert (both.of, both.weights, sorted(alone.teachers)) == (("a",), (3.0,), ["a", "both"])


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 50), "is damaged"),
    ],
)
def test_torn_weights_are_found_before_anything_is_written(soft: Any, tmp_path: Path, harm: Any, said: str) -> None:
    harm(tmp_path / "b")
    with pytest.raises(ConfigError, match=said):
        train(soft())
    assert not RunFolder(soft().folder).root.exists()
    assert said in failing_teachers(soft(DROPS))["b"]


def test_one_that_is_needed_elsewhere_is_never_dropped(soft: Any, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "b")
    named = soft(DROPS, "objective.soft.teacher=b")
    with pytest.raises(ConfigError, match=f"frozen '{tmp_path}/b'"):
        check(named)
    cached = soft(DROPS, "teachers.c={kind: cached, of: b}")
    with pytest.raises(ConfigError, match=f"frozen '{tmp_path}/b'"):
        check(cached)


def test_not_all_may_be_gone(soft: Any, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(ConfigError, match=r"teachers\.both: none of its teachers can be had"):
        check(soft(DROPS))


def test_a_student_learns_from_those_that_are_left_and_the_run_says_so(soft: Any, tmp_path: Path, sayings: Any) -> None:
    """To the bit the student of an ensemble's other teacher alone; when the lost one comes back, it stays out."""
    train(soft("objective.soft.teacher=a", run="alone"))
    away = tmp_path / "away"
    shutil.move(tmp_path / "b", away)
    diagnosis = examine(soft(DROPS))
    assert [(one.level, one.what) for one in diagnosis.findings if "left out" in one.said] == [("warning", "ensemble")]
    assert all(one.level != "error" for one in diagnosis.findings), diagnosis.findings
    recipe = soft(DROPS)
    card = run_all(recipe, progress=sayings)
    torch.testing.assert_close(_weights(recipe), _weights(soft(run="alone")), rtol=0, atol=0)
    (said,) = [line for line in sayings.said if "left out" in line]
    assert said.startswith("warning: The teacher 'b' is left out of its ensemble: ")
    assert any("'b' is left out" in note for note in card.notes)
    shutil.move(away, tmp_path / "b")
    run_all(recipe, progress=sayings)
    assert list(read_json(RunFolder(recipe.folder).lacking)) == ["b"]


def test_one_that_a_student_has_learned_from_may_not_go(soft: Any, tmp_path: Path) -> None:
    train(soft(DROPS))
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(ConfigError, match="a student of this run has learned from it"):
        train(soft(DROPS))
