"""A run's rationales on their way to a Hub and back, through the command line and the real clients."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import TOKEN, HubServer

pytestmark = pytest.mark.slow

_LOAD = """
import json
from datasets import load_dataset
rows = load_dataset("ann/rows", split="train")
print(json.dumps([rows.num_rows, rows.column_names, rows[0]["outcome"]]))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def gathered(cli: Callable[..., Any], shop: str, tmp_path: Path) -> Path:
    cli("generate-rationales", shop)
    return tmp_path / "runs" / "tiny"


def _online(hub: HubServer, token: str) -> dict[str, str | None]:
    """The environment of a push, without what keeps the other tests off the network."""
    return {**hub.environment(token=token), "HF_HUB_OFFLINE": None, "HF_DATASETS_OFFLINE": None}


def test_rationales_are_pushed_once_privately_and_load_by_their_name(
    hub: HubServer, gathered: Path, cli: Callable[..., Any]
) -> None:
    online = _online(hub, TOKEN)
    listed = cli("push-rationales", str(gathered), "--repo-id", "ann/rows", "--dry-run").stdout
    assert "train.parquet" in listed
    assert "Nothing was sent." in listed
    assert not hub.repositories

    first = cli("push-rationales", str(gathered), "--repo-id", "ann/rows", **online).stdout
    assert "Pushed (private)" in first
    repository = hub.repositories["dataset", "ann/rows"]
    assert repository.private
    sent = set(repository.contents())
    assert {"README.md", "train.parquet", "funnel.json"} <= sent
    assert not any("journal" in name or "ledger" in name for name in sent)

    again = cli("push-rationales", str(gathered), "--repo-id", "ann/rows", **online).stdout
    assert "Nothing to do" in again
    assert [commit.message for commit in repository.commits] == ["initial commit", "Rationales of tiny"]

    loaded = subprocess.run(
        [sys.executable, "-c", _LOAD],
        env=hub.environment(token=TOKEN),
        cwd=gathered,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    rows, columns, outcome = json.loads(loaded.stdout)
    assert rows == 64
    assert {"rationale", "hinted", "agreement", "key"} <= set(columns)
    assert outcome == "kept"


def test_what_cannot_be_pushed_is_one_error(hub: HubServer, gathered: Path, cli: Callable[..., Any]) -> None:
    wrong = cli("push-rationales", str(gathered), "--repo-id", "ann/rows", expect=2, **_online(hub, "hf_no"))
    assert "hf auth login" in wrong.stderr
    assert "hf_no" not in wrong.stderr + wrong.stdout
    nothing = cli("push-rationales", str(gathered.parent), "--repo-id", "ann/rows", expect=2)
    assert "not a run folder" in nothing.stderr
