"""Whatever is wrong, one clear error on standard error, exit code 2, and nothing half-written."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROWS = [
    {"id": f"r{i}", "question": f"Which one is number {i}?", "label": "ab"[i % 2], "options": ["a", "b"]}
    for i in range(20)
]
OWN = "task={kind: jsonl, data: rows.jsonl, fields: {id: id, input: question, label: label, choices: options}}"
LABELS = ("rationales=null", "objective=[{name: label, loss: {kind: cross_entropy}, targets: [label]}]")


def _check(tmp_path: Path, done: subprocess.CompletedProcess[str], *said: str) -> None:
    """One error that says all of this, and no file that looks finished or is half there."""
    assert done.stderr.startswith("error: "), done.stderr
    assert sum("error" in line.split(":")[0].lower() for line in done.stderr.splitlines()) == 1, done.stderr
    for part in said:
        assert part in done.stderr
    assert not list(tmp_path.rglob("*.part"))
    assert not list(tmp_path.rglob("scorecard.*"))
    assert not list(tmp_path.rglob("result.json"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "gone.yaml"], ["gone.yaml: there is no such recipe", "distill-llm recipe list"]),
        (["train", "gone.yaml"], ["gone.yaml: there is no such recipe"]),
        (["run", "runs"], ["runs: there is no such recipe"]),  # a folder
        (["evaluate", "runs/gone"], ["runs/gone: not a run folder", "Expected runs/<name>"]),
        (["run", "shop.yaml", "train.max_step=3"], ["train.max_step", "Did you mean 'max_steps'?"]),
        (["run", "shop.yaml", "train.max_steps=few"], ["train.max_steps", "valid integer", "'few'"]),
        (["run", "shop.yaml", "train.learning_rate=-1"], ["train.learning_rate", "greater than 0", "-1"]),
        (["run", "shop.yaml", "seed"], ["override 'seed': expected key=value"]),
        (["train", "shop.yaml"], ["the rationales are not there yet", "distill-llm generate-rationales"]),
        (["train", "shop.yaml", *LABELS, "--arm", "labls"], ["--arm labls", "'labels_same_steps'", "'student'"]),
        (["run", "shop.yaml", "student.config.d_modle=8"], ["student.config.d_modle", "Did you mean 'd_model'?"]),
        (
            ["run", "shop.yaml", "student.config.model_type=lama"],
            ["'lama' is not a model type", "Did you mean 'llama'?"],
        ),
        (["run", "shop.yaml", "student={model: ./gone}"], ["student.model: there is no folder './gone'"]),
        (
            ["generate-rationales", "shop.yaml", "rationales.prompt.exemplars=gone"],
            ["rationales.prompt.exemplars 'gone': no such file"],
        ),
        (
            ["generate-rationales", "shop.yaml", "rationales.teacher={kind: replay, files: {train: gone*.json}}"],
            ["rationales.teacher.files.train: no file matches 'gone*.json'"],
        ),
        (["run", "shop.yaml", OWN.replace("rows", "gone")], ["data 'gone.jsonl': no such file or folder"]),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_wrong_word_or_recipe(words: list[str], said: list[str], cli: Any, shop: str, tmp_path: Path) -> None:
    _check(tmp_path, cli(*words, expect=2), *said)


def _with(index: int, **fields: Any) -> list[dict[str, Any]]:
    return [row | fields if i == index else row for i, row in enumerate(ROWS)]


def _without(index: int, name: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if i != index or k != name} for i, row in enumerate(ROWS)]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], ["rows.jsonl: it has no rows"]),
        (_without(3, "question"), ["rows.jsonl, row 4: the field 'question' is missing", "'id', 'label'"]),
        (_with(3, question=" "), ["rows.jsonl, row 4: the field 'question' is empty"]),
        (_with(3, options="a or b"), ["rows.jsonl, row 4: the field 'options' is 'a or b'", "list of texts"]),
        (_with(3, id="r2"), ["1 ids stand on more than one example, such as 'r2'"]),
        (_with(3, label="c"), ["example 'r3' has the label 'c'", "its choices ['a', 'b']"]),
        (_with(3, label=["a"]), ["rows.jsonl, row 4: the field 'label' is a list"]),
        ([row | {"question": "Which?"} for row in ROWS], ["inputs are in both validation and test", "'which?"]),
        (ROWS[:1], ["too few to cut a test split"]),
        ([{"question": "a", "id": 1, "options": ["a"]}], ["no row has the field 'label'"]),
    ],
    ids=["empty", "no-field", "blank", "no-list", "twice", "no-choice", "list", "overlap", "one-row", "no-label"],
)
def test_wrong_data(
    rows: list[dict[str, Any]], said: list[str], cli: Any, shop: str, tmp_path: Path, save_rows: Any
) -> None:
    save_rows("rows.jsonl", rows)
    _check(tmp_path, cli("run", shop, *LABELS, OWN, expect=2), *said)


def test_line_that_is_no_json(cli: Any, shop: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": 1}\n{"id": 2,\n')
    _check(tmp_path, cli("run", shop, *LABELS, OWN, expect=2), "rows.jsonl:2: not valid JSON", "correct the line")


def test_test_inputs_that_are_in_train(cli: Any, shop: str, tmp_path: Path, save_rows: Any) -> None:
    save_rows("rows.jsonl", ROWS)
    save_rows("test.jsonl", [row | {"id": f"t{i}"} for i, row in enumerate(ROWS[:5])])
    save_rows("valid.jsonl", [{"id": "v", "question": "Another one?", "label": "a", "options": ["a", "b"]}])
    words = ("run", shop, *LABELS, OWN, "task.test_data=test.jsonl", "task.validation_data=valid.jsonl")
    _check(tmp_path, cli(*words, expect=2), "inputs are in both train and test", "task.overlap=drop")


def test_unknown_model_without_a_network_is_said_soon_and_once(cli: Any, shop: str, tmp_path: Path) -> None:
    """Left alone, the libraries retry for a minute. (With a network the Hub says that there is no such model.)"""
    words = ("run", shop, *LABELS, "student={model: google/no-such-model-here}")
    done = cli(*words, expect=2, timeout=120, HF_HUB_OFFLINE=None, HF_DATASETS_OFFLINE=None)
    _check(tmp_path, done, "student.model: cannot load the ", "'google/no-such-model-here'", "local folder")
    assert "Retrying" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_folder_of_another_recipe(cli: Any, shop: str, tmp_path: Path) -> None:
    cli("generate-rationales", shop)
    before = (tmp_path / "runs" / "tiny" / "recipe.yaml").read_bytes()
    done = cli("run", shop, "name=other", "run_dir=runs/tiny", expect=2)
    _check(tmp_path, done, "was filled by another recipe", "name: 'tiny' there, 'other' here", "run_dir=runs/another")
    assert (tmp_path / "runs" / "tiny" / "recipe.yaml").read_bytes() == before


def test_folder_that_is_no_run(cli: Any, shop: str, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text.tex").write_text("years")
    _check(
        tmp_path, cli("run", shop, "run_dir=thesis", expect=2), "thesis exists, is not empty, and is not a run folder"
    )
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["text.tex"]


def test_file_where_the_run_should_be(cli: Any, shop: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    done = cli("run", shop, "run_dir=file/run", expect=2)
    _check(tmp_path, done, "file/run", "A file lies where a folder is needed")


Disk = Callable[..., Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A file system of its own: ``disk("size=64k")``; called again, it is mounted anew with other options."""
    folder, mounted = tmp_path / "disk", False
    folder.mkdir()

    def mount(options: str) -> Path:
        nonlocal mounted
        again = "remount," if mounted else ""
        if os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.skip("mounting a small disk needs root")
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", folder],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"no mount here: {done.stderr.strip()}")
        mounted = True
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_read_only_disk(cli: Any, shop: str, tmp_path: Path, disk: Disk) -> None:
    disk("ro,size=64k")
    done = cli("run", shop, "run_dir=disk/run", expect=2)
    _check(tmp_path, done, "disk/run/recipe.yaml: cannot write", "The file system is read-only: choose another run_dir")


def test_disk_that_is_full_while_the_teacher_writes(
    cli: Any, shop: str, tmp_path: Path, disk: Disk, lines: Any
) -> None:
    disk("size=24k")
    words = ("generate-rationales", shop, "task.train_size=200", "run_dir=disk/run")
    done = cli(*words, expect=2)
    _check(tmp_path, done, "disk/run/rationales/", "cannot write", "The disk is full: free some space")
    disk("size=1m")
    journal = tmp_path / "disk" / "run" / "rationales" / "journal.jsonl"
    whole = journal.read_bytes().count(b"\n")
    assert whole > 10
    assert f"rationales, train: {whole} of 200" in cli(*words).stdout
    assert len({entry["key"] for entry in lines(journal)}) == len(lines(journal)) == 200


@pytest.mark.slow
def test_disk_that_is_full_while_the_student_learns(cli: Any, shop: str, tmp_path: Path, disk: Disk) -> None:
    settings = ("student.config.d_ff=2048", "train.optimizer=adamw", "evaluate.controls=[]")
    words = ("run", shop, *settings, "run_dir=disk/run")
    for size in (
        "128k",
        "1m",
    ):  # full at the weights, which safetensors writes; at the optimiser's state, which torch does
        disk(f"size={size}")
        done = cli(*words, expect=2)
        _check(tmp_path, done, "disk/run", "The disk is full: free some space")
        assert len(done.stderr.splitlines()) == 1
    disk("size=16m")
    cli(*words)
    assert (tmp_path / "disk" / "run" / "scorecard.json").is_file()
