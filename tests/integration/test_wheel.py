"""The wheel holds the recipes and the data, and its command finds them from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _made(*words: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if "hatchling" in done.stderr and "No matching distribution" in done.stderr:
        pytest.skip("no package index here that has hatchling")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_wheel_works_from_another_folder(tmp_path: Path) -> None:
    # pip runs in the root: `make` names its constraints file relative to it.
    _made("-m", "pip", "wheel", ROOT, "--no-deps", "--quiet", "-w", tmp_path / "wheels", cwd=ROOT)
    (wheel,) = (tmp_path / "wheels").glob("distill_llm-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("recipes", "data"):
        ours = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert ours
        assert {name for name in ours if f"distill_llm/assets/{name}" not in held} == set()
    assert not [name for name in held if name.startswith(("tests/", "recipes/", "data/"))]

    site = tmp_path / "site"
    _made("-m", "pip", "install", "--no-deps", "--quiet", "--target", site, wheel, cwd=ROOT)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = {"PYTHONPATH": str(site)}
    home = _made("-c", "import distill_llm; print(distill_llm.__file__)", cwd=elsewhere, **where)
    assert home.startswith(str(site))  # and not the checkout
    said = _made("-m", "distill_llm", "recipe", "check", "recipes/t5-base.yaml", cwd=elsewhere, **where)
    assert said.startswith("recipes/t5-base.yaml: valid")
    said = _made("-m", "distill_llm", "generate-rationales", "recipes/my-data.yaml", cwd=elsewhere, **where)
    assert "kept" in said
    assert (elsewhere / "runs" / "my-data" / "rationales" / "train.parquet").is_file()
