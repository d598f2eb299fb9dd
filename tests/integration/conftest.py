"""The installed command line in a folder of its own, a small recipe for it, and tiny models saved as folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

COMMAND = Path(sys.executable).with_name("distill-llm")

SHOP = """\
name: tiny
task: {kind: shop, products: 20, train_size: 64, validation_size: 8, test_size: 24}
rationales: {teacher: {kind: gold}}
student:
  config: {model_type: t5, d_model: 16, d_kv: 8, d_ff: 32, num_layers: 1, num_heads: 2, dropout_rate: 0.1}
  tokenizer: {kind: words, vocab_size: 256}
objective:
  - {name: label, loss: {kind: cross_entropy}, targets: [label]}
  - {name: rationale, loss: {kind: cross_entropy}, targets: [rationale]}
train:
  {optimizer: adafactor, learning_rate: 2.0e-2, max_steps: 8, rows_per_step: 16, rows_per_batch: 16,
   max_input_tokens: 32, max_target_tokens: 32, validate_every: 4}
evaluate: {resamples: 200, max_new_tokens: 4}
"""

Cli = Callable[..., subprocess.CompletedProcess[str]]


def _environment(**changes: str | None) -> dict[str, str]:
    """Ours, without what a test run under torchrun or on a wide terminal would bring along."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "COLUMNS")}
    wanted = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {name: value for name, value in (kept | wanted | changes).items() if value is not None}


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Runs ``distill-llm`` with these words in ``tmp_path``; ``expect`` is the exit code, 0 if not said."""

    def run(
        *words: str, expect: int = 0, timeout: float = 240, **environment: str | None
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [COMMAND, *words],
            cwd=tmp_path,
            env=_environment(**environment),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == expect, f"{words} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts ``distill-llm`` in ``tmp_path`` and in a process group of its own, as a terminal does."""

    def begin(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [COMMAND, *words],
            cwd=tmp_path,
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return begin


@pytest.fixture
def shop(tmp_path: Path) -> str:
    """The name of a recipe in ``tmp_path`` that trains in a second and fills ``runs/tiny``."""
    (tmp_path / "shop.yaml").write_text(SHOP)
    return "shop.yaml"


@pytest.fixture
def save_rows(tmp_path: Path) -> Callable[[str, list[dict[str, Any]]], None]:
    """Writes JSON lines into a file of ``tmp_path``."""

    def save(name: str, rows: list[dict[str, Any]]) -> None:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    return save


@pytest.fixture
def save_tiny(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., str]:
    """Saves a tiny model in a folder of ``tmp_path``: ``save_tiny("t5", text="words that it knows")``."""

    def save(family: str, **settings: Any) -> str:
        made = request.getfixturevalue(f"tiny_{family}")(**settings)
        made.model.save_pretrained(tmp_path / family)
        made.tokenizer.save_pretrained(tmp_path / family)
        return family

    return save


@pytest.fixture
def lines() -> Callable[[Path], list[Any]]:
    """The objects of a file of JSON lines."""
    return lambda path: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
