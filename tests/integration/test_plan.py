"""`distill-llm plan`: a recipe that fits, one that does not and what makes it fit, and wrong use."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.integration.conftest import Cli

pytestmark = pytest.mark.slow
MALLOC = "MALLOC_MMAP_THRESHOLD_"


def test_it_fits_and_loads_nothing(cli: Cli, shop: str, tmp_path: Path) -> None:
    said = cli("plan", shop).stdout
    for part in ("weights", "states", "activations", "interpreter and libraries", "Disk", "Time", "It fits"):
        assert part in said
    assert not list(tmp_path.rglob("*.safetensors"))


def test_it_does_not_fit_until_the_override_is_pasted(cli: Cli, shop: str) -> None:
    """What is shown as fitting, typed behind the same command, fits."""
    large = ["student.config.d_ff=16384", "student.config.d_model=128", "evaluate.controls=[]"]
    large += ["train.rows_per_step=64", "train.rows_per_batch=64"]
    used = cli("plan", shop, *large).stdout
    peaks = re.findall(r"^all (.*)$", used, re.MULTILINE)[0].replace(",", "").split()
    limit = f"{max(map(float, peaks)) - 30:.0f}MB"
    said = cli("plan", shop, *large, "--memory", limit, expect=1).stdout
    assert "does not fit" in said
    words = shlex.split(re.findall(r"^Next: (.*)$", said, re.MULTILINE)[0])
    environment = dict(word.split("=", 1) for word in words if word.startswith(MALLOC))
    overrides = [word for word in words[words.index(shop) + 1 :] if "=" in word]
    assert overrides != large or environment
    again = cli("plan", shop, *overrides, "--memory", limit, **environment).stdout
    assert "It fits" in again


def test_a_gpu_that_is_not_here(cli: Cli, shop: str) -> None:
    said = cli("plan", shop, "--device", "t4").stdout
    assert "t4" in said
    assert "nothing was measured" in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--memory", "much"], "--memory: 'much' is no size"),
        (["--device", "abacus"], "--device: 'abacus' is not known"),
        (["train.max_steps=none"], "train.max_steps"),
        (["student.config={}", "student.model=there/is/none"], "student.model"),
    ],
)
def test_bad_input(cli: Cli, shop: str, words: list[str], expected: str) -> None:
    assert expected in cli("plan", shop, *words, expect=2).stderr
