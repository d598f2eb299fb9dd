"""What the Dockerfile promises that its linter, which `make check` runs, cannot know."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.main import get_command

from distill_llm.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
TEXT = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"))


def instructions(name: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in TEXT.splitlines() if line.startswith(f"{name} ")]


def test_what_it_copies_is_there_and_reaches_the_build() -> None:
    let_through = {
        line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")
    }
    copied = {source for line in instructions("COPY") for source in line.split()[:-1]}
    assert copied == let_through
    assert not [source for source in copied if not (ROOT / source).exists()]


def test_it_starts_the_quickstart_and_takes_any_other_command() -> None:
    (entry,), (command,) = instructions("ENTRYPOINT"), instructions("CMD")
    assert json.loads(entry) == ["distill-llm"]
    assert json.loads(command)[0] == "quickstart"
    assert json.loads(command)[0] in get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]


def test_it_does_not_run_as_root_and_keeps_downloads_in_a_volume() -> None:
    (user,) = instructions("USER")
    assert user not in ("0", "root")
    home = re.search(r"HF_HOME=(\S+)", TEXT)
    assert home is not None
    assert any(Path(home[1]).is_relative_to(volume) for volume in instructions("VOLUME"))


@pytest.mark.parametrize("argument", ["CUDA", "TORCH_INDEX"])
def test_the_build_arguments_are_those_of_make(argument: str) -> None:
    assert any(line.startswith(f"{argument}=") for line in instructions("ARG"))
    assert argument in (ROOT / "Makefile").read_text(encoding="utf-8")
