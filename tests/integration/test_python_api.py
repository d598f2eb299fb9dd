"""The package as a library: the public names, and the example of the README as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_public_names_are_what_they_say() -> None:
    import transformers

    import distill_llm

    assert issubclass(distill_llm.DistillTrainer, transformers.Trainer)
    assert {name for name in distill_llm.__all__ if getattr(distill_llm, name) is None} == set()
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        distill_llm.distil  # noqa: B018


@pytest.mark.slow
def test_ten_lines(tmp_path: Path, shop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill_llm import evaluate, generate_rationales, load_recipe, run, train

    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(shop, ["train.max_steps=4", "evaluate.controls=[labels_same_steps]"])
    folder = generate_rationales(recipe)
    assert folder.rationales("train").is_file()
    assert train(recipe).trained_arms() == ["student"]
    assert [entry.name for entry in evaluate(folder.root).entries] == ["student"]
    card = run(recipe)
    assert [entry.name for entry in card.entries] == ["student", "labels same steps"]
    assert folder.scorecard.is_file()


@pytest.mark.slow
def test_the_trainer_by_hand_is_that_of_train(tmp_path: Path, shop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same rows, same steps, same best checkpoint: the weights are equal, bit for bit."""
    import torch
    from safetensors.torch import load_file

    from distill_llm import DistillTrainer, generate_rationales, load_recipe, student_trainer, train

    monkeypatch.chdir(tmp_path)
    trained = load_recipe(shop, ["train.max_steps=4"])
    generate_rationales(trained)
    expected = load_file(train(trained).model("student") / "model.safetensors")
    by_hand = load_recipe(shop, ["train.max_steps=4", "run_dir=by-hand"])
    generate_rationales(by_hand)
    trainer = student_trainer(by_hand)
    assert isinstance(trainer, DistillTrainer)
    trainer.train()
    weights = dict(trainer.model.named_parameters())
    assert expected.keys() >= {"shared.weight"}
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


@pytest.mark.slow
@pytest.mark.skipif(not EXAMPLES, reason="README.md has no python block yet")
def test_example_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[0], "README.md", "exec"), {})
    (scorecard,) = tmp_path.rglob("scorecard.json")
    said = capsys.readouterr().out
    assert "labels same compute" in said
    assert f"student {' ' * 10}"[:12] in said
    assert (scorecard.parent / "scorecard.md").is_file()
