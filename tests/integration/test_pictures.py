"""Teacher and student of two modalities, from the command line: text teaches a student that sees, and that one teaches
one that reads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from distill_llm.evaluation.scorecard import load_scorecard
from tests.conftest import T5_SIZES, VIT_SIZES, vision_sizes

pytest.importorskip("PIL", reason="needs the extra pictures")
pytestmark = pytest.mark.slow

WORDS = "predict explain : ann bob carl dora emil fay gus hana buys and . who pays more ? + = > < " + " ".join(
    map(str, range(41))
)
PICTURE = "{width: 192, height: 33, font: fixed}"
OBJECTIVE = (
    "objective=[{name: label, loss: {kind: cross_entropy}, targets: [label]},"
    " {name: rationale, loss: {kind: cross_entropy}, targets: [rationale]},"
    " {name: soft, loss: {kind: forward_kl, temperature: 2.0}, targets: [label, rationale], teacher: TEACHER}]"
)
SEES = (
    f"student.config={json.dumps(vision_sizes(n_positions=40))}",
    "student.tokenizer=t5",
    f"student.picture={PICTURE}",
    "student.prefix_side=decoder",
    "train.optimizer=adamw",
    "teachers={big: {kind: frozen, model: t5, view: {template: '{input}'}}}",
    OBJECTIVE.replace("TEACHER", "big"),
)


def test_text_teaches_sight_and_sight_teaches_text(
    cli: Any, shop: str, tmp_path: Path, save_tiny: Any, lines: Any
) -> None:
    save_tiny("t5", text=WORDS)
    said = " ".join(cli("doctor", shop, *SEES, COLUMNS="200").stdout.split())
    assert "drawn on 192 x 33 pixels; the model gets 192 x 33, grey, and makes 49 states of each" in said
    assert "[picture: " in said
    cli("run", shop, *SEES, "evaluate.controls=[labels_same_steps]")
    run = tmp_path / "runs" / "tiny"
    model = run / "models" / "student" / "model"
    assert json.loads((model / "preprocessor_config.json").read_text())["size"] == {"height": 33, "width": 192}
    assert json.loads((model / "config.json").read_text())["encoder"]["patch_size"] == VIT_SIZES["patch_size"]
    assert len(lines(run / "predictions" / "student.jsonl")) == 24
    assert [entry.role for entry in load_scorecard(run).entries] == ["student", "control"]
    view = f"{{template: '{{input}}', picture: {PICTURE}, prefix_side: decoder}}"
    cli(
        "run",
        shop,
        "run_dir=runs/back",
        "student.tokenizer=t5",
        f"teachers={{big: {{kind: frozen, model: {model}, view: {view}}}, kept: {{kind: cached, of: big}}}}",
        OBJECTIVE.replace("TEACHER", "kept"),
        "evaluate.controls=[]",
    )
    back = tmp_path / "runs" / "back"
    assert json.loads((back / "signals" / "kept" / "manifest.json").read_text())
    assert len(lines(back / "predictions" / "student.jsonl")) == 24


def test_a_chain_of_models_that_see(
    cli: Any, shop: str, tmp_path: Path, save_tiny: Any, tiny_vision: Any, lines: Any
) -> None:
    """Each stage reads its pictures as the folder of the model above says; answers are chosen by likelihood."""
    save_tiny("t5", text=WORDS)
    eye = tiny_vision(text=WORDS, n_positions=40)
    for one in (eye.model, eye.tokenizer, eye.painter):
        (one.save_pretrained if one is not eye.painter else one.save)(str(tmp_path / "eye"))
    larger = vision_sizes(n_positions=40, n_embd=24)
    chain = f"{{kind: assistant_chain, teacher: eye, assistants: [{{name: middle, config: {json.dumps(larger)}}}]}}"
    cli(
        "run",
        shop,
        *SEES,
        f"student.picture={json.dumps(eye.painter.spec.model_dump())}",
        "student.tokenizer=eye",
        "teachers={eye: {kind: frozen, model: eye}}",
        OBJECTIVE.replace("TEACHER", "eye"),
        f"scheme={chain}",
        "evaluate.controls=[]",
        "evaluate.by=likelihood",
    )
    run = tmp_path / "runs" / "tiny"
    for name in ("middle", "student", "teachers/eye"):
        assert len(lines(run / "predictions" / f"{name}.jsonl")) == 24
    assert (run / "models" / "middle" / "model" / "preprocessor_config.json").is_file()
    assert load_scorecard(run).avalanche is not None


def test_two_processes_train_what_one_trains(cli: Any, shop: str, tmp_path: Path, save_tiny: Any) -> None:
    """Weights of which no logit comes would keep them waiting for each other."""
    save_tiny("t5", text=WORDS)
    words = [shop, *SEES, "train.rows_per_batch=4", "train.max_steps=4", "evaluate.controls=[]"]
    cli("generate-rationales", *words, "run_dir=one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    cli("train", *words, "run_dir=one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "-m", "distill_llm", "train", *words, "run_dir=two"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (load_file(tmp_path / run / "models/student/model/model.safetensors") for run in ("one", "two"))
    gaps = {name: float((one[name] - two[name]).abs().max()) for name in one}
    assert max(gaps.values()) < 2e-5, gaps


def test_pictures_of_the_data(cli: Any, tmp_path: Path, save_rows: Any, lines: Any) -> None:
    """Scans of your own, in three colours and of any size; the text beside them is for teachers."""
    from PIL import Image

    rows: list[dict[str, Any]] = []
    for number in range(30):
        Image.new("RGB", (20 + number, 30), ("red", "blue")[number % 2]).save(tmp_path / f"{number}.png")
        colour = ("red", "blue")[number % 2]
        rows.append({"question": "which colour ?", "label": colour, "why": f"it is {colour}", "scan": f"{number}.png"})
    save_rows("scans.jsonl", rows)
    config = vision_sizes()
    config["encoder"] = VIT_SIZES | {"num_channels": 3, "patch_size": 16}
    (tmp_path / "scans.yaml").write_text(
        f"""
name: scans
task:
  kind: jsonl
  data: scans.jsonl
  fields: {{input: question, picture: scan, rationale: why}}
  choices: [red, blue]
rationales: {{teacher: {{kind: gold}}}}
student:
  picture: {{source: data, width: 32, height: 32}}
  prefix_side: decoder
  tokenizer: {{kind: words, vocab_size: 64}}
  config: {json.dumps(config)}
objective:
  - {{name: label, loss: {{kind: cross_entropy}}, targets: [label]}}
  - {{name: rationale, loss: {{kind: cross_entropy}}, targets: [rationale]}}
train: {{max_steps: 40, rows_per_step: 16, rows_per_batch: 16, learning_rate: 3.0e-3, max_target_tokens: 8}}
evaluate: {{controls: [], resamples: 200}}
"""
    )
    cli("run", "scans.yaml")
    predictions = lines(tmp_path / "runs" / "scans" / "predictions" / "student.jsonl")
    assert len(predictions) == 3
    assert all(one["correct"] for one in predictions), "two colours are easily told apart"
    (tmp_path / "7.png").unlink()
    done = cli("run", "scans.yaml", "run_dir=again", expect=2)
    assert "7.png' cannot be read" in done.stderr


def test_a_teacher_of_picture_and_text(
    cli: Any, tmp_path: Path, save_rows: Any, save_llava: Any, tiny_t5: Any, lines: Any
) -> None:
    """The recipe with a small LLaVA in a folder: doctor, a cache of what it says, a student of text alone."""
    from PIL import Image

    rows: list[dict[str, Any]] = []
    for number in range(30):
        Image.new("RGB", (20, 30), ("red", "blue")[number % 2]).save(tmp_path / f"{number}.png")
        rows.append({"question": "who pays more ?", "answer": "ann", "image": f"{number}.png", "why": "ann pays 2 ."})
    save_rows("photos.jsonl", rows)
    save_llava(tmp_path / "eye", tiny_t5(text=f"{WORDS} USER ASSISTANT").tokenizer)
    recipe = str(Path(__file__).parents[2] / "recipes" / "image-text-teacher.yaml")
    words = [
        recipe,
        "task.data=photos.jsonl",
        "task.fields.rationale=why",
        "rationales.teacher={kind: gold}",
        "student.model=",
        f"student.config={json.dumps(T5_SIZES)}",
        "student.tokenizer=eye",
        "teachers.eye.model=eye",
        "teachers.eye.dtype=float32",
        "teachers.eye.own_tokenizer=false",
        "teachers.kept={kind: cached, of: eye}",
        "objective.soft={name: soft, loss: {kind: forward_kl}, targets: [rationale], teacher: kept}",
        "train.max_steps=4",
        "train.epochs=0",
        "train.rows_per_step=8",
        "train.rows_per_batch=8",
        "train.max_input_tokens=32",
        "train.max_target_tokens=16",
        "evaluate.controls=[]",
        "run_dir=eye-run",
    ]
    said = " ".join(cli("doctor", *words, COLUMNS="200").stdout.split())
    assert "may run" in said
    cli("run", *words)
    assert len(lines(tmp_path / "eye-run" / "predictions" / "student.jsonl")) == 3
    assert json.loads((tmp_path / "eye-run" / "signals" / "kept" / "manifest.json").read_text())
    done = cli("run", *words, "teachers.eye.view.picture=null", "run_dir=blind")
    assert "kept" in done.stdout + done.stderr, "it also teaches by text alone"
