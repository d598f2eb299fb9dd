"""Pushing files to a Hub: one commit, private unless said otherwise, resumable, with one clear error each."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distill_llm.core.errors import ConfigError, DataError
from distill_llm.hub.upload import Upload, plan_upload, push

_SPEC = importlib.util.spec_from_file_location("hub_server", Path(__file__).parents[2] / "hub_server.py")
assert _SPEC is not None
assert _SPEC.loader is not None
hub_server = importlib.util.module_from_spec(_SPEC)
sys.modules["hub_server"] = hub_server  # a dataclass looks its module up there
_SPEC.loader.exec_module(hub_server)

# A process of its own: huggingface_hub reads its settings when it is imported, and here it was imported offline.
_PUSH = """
import json, sys
from pathlib import Path
from distill_llm.core.errors import DistillError
from distill_llm.hub.upload import push
wanted = json.loads(sys.argv[1])
files = {path: Path(file) for path, file in wanted.pop("files").items()}
try:
    pushed = push(files, **wanted)
    print(json.dumps({"url": pushed.url, "changed": pushed.changed, "private": pushed.private}))
except DistillError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""
_NAMED = {"repo_id": "ann/rows", "repo_type": "dataset", "message": "Add rationales"}

Push = Callable[..., dict[str, Any]]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Any]:
    with hub_server.HubServer(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Two large files and a small one."""
    made = {
        "train.parquet": b"train" * 1000,
        "test.parquet": b"test" * 1000,
        "README.md": b"---\ntags: [a]\n---\n# Rows\n",
    }
    for name, content in made.items():
        (tmp_path / name).write_bytes(content)
    return {name: tmp_path / name for name in made}


@pytest.fixture
def send(hub: Any, files: dict[str, Path]) -> Push:
    """Calls ``push`` in a new process: ``send(private=False, environment={...})``."""

    def call(environment: dict[str, str] | None = None, **changes: Any) -> dict[str, Any]:
        wanted = {"files": {name: str(file) for name, file in files.items()}} | _NAMED | changes
        return _python(_PUSH, json.dumps(wanted), environment=environment or hub.environment())

    return call


def _python(program: str, *words: str, environment: dict[str, str]) -> dict[str, Any]:
    """What the program's last line of output says."""
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert hub_server.TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_push_makes_a_private_repository_and_one_commit(hub: Any, send: Push, files: dict[str, Path]) -> None:
    said = send()

    made = hub.repositories["dataset", "ann/rows"]
    assert made.private
    assert [commit.message for commit in made.commits] == ["initial commit", "Add rationales"]
    sent = {name: file.read_bytes() for name, file in files.items()}
    assert {path: content for path, content in made.contents().items() if path != ".gitattributes"} == sent
    assert said == {
        "url": f"{hub.endpoint}/datasets/ann/rows/commit/{made.commits[-1].oid}",
        "changed": True,
        "private": True,
    }


def test_large_files_go_to_large_file_storage_and_small_ones_into_git(hub: Any, send: Push) -> None:
    send()

    stored = hub.repositories["dataset", "ann/rows"].commits[-1].files
    assert stored["train.parquet"].lfs == hashlib.sha256(b"train" * 1000).hexdigest()
    assert stored["README.md"].lfs is None
    assert hub.asked("PUT") == 2


def test_models_are_pushed_alike(hub: Any, send: Push, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    said = send(repo_type="model", files={"model.safetensors": str(tmp_path / "model.safetensors")})

    assert said["url"].startswith(f"{hub.endpoint}/ann/rows/commit/")
    assert hub.repositories["model", "ann/rows"].contents()["model.safetensors"] == b"weights"


def test_pushing_the_same_again_makes_no_commit(hub: Any, send: Push) -> None:
    first = send()
    again = send(message="Again")

    assert again == first | {"changed": False}
    assert len(hub.repositories["dataset", "ann/rows"].commits) == 2
    assert hub.asked("PUT") == 2


def test_only_what_changed_is_sent(hub: Any, send: Push, files: dict[str, Path]) -> None:
    send()
    files["test.parquet"].write_bytes(b"other")
    send()

    newest, before = hub.repositories["dataset", "ann/rows"].commits[:0:-1]
    assert newest.files["test.parquet"] != before.files["test.parquet"]
    assert newest.files["train.parquet"] == before.files["train.parquet"]
    assert hub.asked("PUT") == 3


def test_an_upload_that_broke_off_is_taken_up_where_it_stopped(hub: Any, send: Push) -> None:
    hub.fail("PUT", "/lfs/", after=1)
    said = send()
    assert said["error"] == "StorageError"
    assert "broke off (507: made to fail)" in said["message"]
    assert "Type the same command again" in said["message"]
    assert len(hub.repositories["dataset", "ann/rows"].commits) == 1
    tried = hub.asked("PUT")

    hub.faults.clear()
    assert send()["changed"]
    assert hub.asked("PUT") == tried + 1
    assert len(hub.repositories["dataset", "ann/rows"].commits) == 2


def test_a_connection_that_drops_once_is_tried_again(hub: Any, send: Push) -> None:
    hub.fail("PUT", "/lfs/", status=0, times=1)
    assert send()["changed"]
    assert hub.asked("PUT") == 3


def test_a_connection_that_drops_at_the_commit_leaves_nothing_half_done(hub: Any, send: Push) -> None:
    hub.fail("POST", "/commit/", status=0)
    assert send()["error"] == "StorageError"
    assert len(hub.repositories["dataset", "ann/rows"].commits) == 1

    hub.faults.clear()
    assert send()["changed"]
    assert hub.asked("PUT") == 2


def test_a_public_repository_is_refused_unless_public_was_asked_for(hub: Any, send: Push) -> None:
    made = hub.create("dataset", "ann/rows", private=False)
    said = send()
    assert said["error"] == "ConfigError"
    assert "it is public" in said["message"]
    assert len(made.commits) == 1
    assert hub.asked("PUT") == 0

    said = send(private=False)
    assert said["changed"]
    assert not said["private"]
    assert len(made.commits) == 2


def test_a_new_repository_is_public_only_where_that_was_asked_for(hub: Any, send: Push) -> None:
    assert not send(private=False)["private"]
    assert not hub.repositories["dataset", "ann/rows"].private


def test_a_private_repository_stays_private_whatever_is_asked(hub: Any, send: Push) -> None:
    hub.create("dataset", "ann/rows", private=True)
    assert send(private=False)["private"]
    assert hub.repositories["dataset", "ann/rows"].private


def test_a_wrong_token_is_one_clear_error(hub: Any, send: Push) -> None:
    said = send(environment=hub.environment(token="hf_WrongToken"))
    assert said["error"] == "ConfigError"
    assert "does not accept the token (401)" in said["message"]
    assert "hf auth login" in said["message"]
    assert "hf_WrongToken" not in said["message"]
    assert hub.repositories == {}


def test_a_token_is_taken_as_an_argument_before_the_one_of_the_environment(hub: Any, send: Push) -> None:
    assert send(environment=hub.environment(token="hf_WrongToken"), token=hub_server.TOKEN)["changed"]


def test_no_token_at_all_is_one_clear_error(hub: Any, send: Push) -> None:
    said = send(environment=hub.environment(token=None))
    assert said["error"] == "ConfigError"
    assert "not logged in" in said["message"]
    assert hub.requests == []


def test_a_token_that_would_be_quoted_by_the_network_library_is_refused_unsent(hub: Any, send: Push) -> None:
    for token in ("hf_two\nlines", "hf_with space", "hf_é"):
        said = send(token=token)
        assert said["error"] == "ConfigError"
        assert token not in said["message"]
    assert hub.requests == []


def test_a_token_that_may_only_read_is_one_clear_error(hub: Any, send: Push) -> None:
    said = send(environment=hub.environment(token=hub_server.READ_TOKEN))
    assert said["error"] == "ConfigError"
    assert "may not write there (403" in said["message"]
    hub.create("dataset", "ann/rows", private=True)
    assert "may not write there (403" in send(environment=hub.environment(token=hub_server.READ_TOKEN))["message"]


def test_the_name_of_somebody_else_is_one_clear_error(hub: Any, send: Push) -> None:
    said = send(repo_id="bob/rows")
    assert said["error"] == "ConfigError"
    assert 'rights to create a dataset under the namespace "bob"' in said["message"]
    assert send(repo_id="lab/rows")["changed"]


def test_a_hub_that_does_not_answer_is_said_soon(hub: Any, send: Push) -> None:
    gone = hub.environment(HF_ENDPOINT="http://127.0.0.1:9")
    said = send(environment=gone)
    assert said["error"] == "StorageError"
    assert "the Hub (http://127.0.0.1:9) cannot be reached (ConnectError)" in said["message"]

    said = send(environment=hub.environment(HF_HUB_OFFLINE="1"))
    assert said["error"] == "StorageError"
    assert "OfflineModeIsEnabled" in said["message"]


def test_a_card_that_the_hub_refuses_sends_nothing(hub: Any, send: Push, files: dict[str, Path]) -> None:
    files["README.md"].write_text("---\ntags: [a\n---\n")
    said = send()
    assert said["error"] == "DataError"
    assert "README.md: " in said["message"]
    assert hub.asked("PUT") == 0


def test_what_was_pushed_loads_by_its_name(hub: Any, send: Push, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"rationale": ["because", None]}), tmp_path / "rows.parquet")
    send(files={"data/train.parquet": str(tmp_path / "rows.parquet")})

    program = (
        "import json, datasets, huggingface_hub, pathlib\n"
        "rows = datasets.load_dataset('ann/rows')['train']['rationale']\n"
        "file = huggingface_hub.hf_hub_download('ann/rows', 'data/train.parquet', repo_type='dataset')\n"
        "print(json.dumps([list(rows), pathlib.Path(file).stat().st_size]))\n"
    )
    rows, num_bytes = _python(program, environment=hub.environment())
    assert rows == ["because", None]
    assert num_bytes == (tmp_path / "rows.parquet").stat().st_size
    assert hub.asked("HEAD", "/datasets/ann/rows/resolve/") > 0


def test_a_private_data_set_is_hidden_from_others(hub: Any, send: Push) -> None:
    send()
    program = (
        "import json, huggingface_hub\n"
        "try: huggingface_hub.hf_hub_download('ann/rows', 'README.md', repo_type='dataset'); print('\"seen\"')\n"
        "except huggingface_hub.errors.RepositoryNotFoundError: print('\"hidden\"')\n"
    )
    assert _python(program, environment=hub.environment()) == "seen"
    nobody = hub.environment(token=None, HF_HOME=str(hub.folder / "another home"))
    assert _python(program, environment=nobody) == "hidden"


@pytest.mark.parametrize(
    "name", ["rows", "ann/rows/more", "ann/ro ws", "ann/--", "", "ann/rows.git", "datasets/ann/rows"]
)
def test_a_name_that_the_hub_cannot_have_is_refused_before_anything_is_asked(name: str, files: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="Expected 'owner/name'"):
        push(files, repo_id=name, repo_type="dataset", message="a")


def test_a_file_that_is_not_there_and_a_path_that_leads_out_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.parquet: no such file"):
        push({"a": tmp_path / "gone.parquet"}, repo_id="a/b", repo_type="dataset", message="a")
    for path in ("../a", "/a", "a/../../b", ".git/config", "", "."):
        with pytest.raises(ConfigError, match="not a path in a repository"):
            push({path: files["README.md"]}, repo_id="a/b", repo_type="dataset", message="a")
    with pytest.raises(ConfigError, match="no file was named"):
        push({}, repo_id="a/b", repo_type="model", message="a")


def test_a_plan_lists_paths_and_sizes_and_asks_nobody(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "more.json").write_text("{}")
    named = [Path("README.md"), files["train.parquet"], Path("data/more.json"), Path("README.md")]
    assert plan_upload(tmp_path, named) == (
        Upload("README.md", files["README.md"], 25),
        Upload("train.parquet", files["train.parquet"], 5000),
        Upload("data/more.json", tmp_path / "data" / "more.json", 2),
    )


def test_a_plan_refuses_files_that_are_elsewhere_or_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lies outside"):
        plan_upload(tmp_path / "a", [tmp_path / "b"])
    with pytest.raises(ConfigError, match="not a path in a repository"):
        plan_upload(tmp_path / "a", [Path("../b")])
    with pytest.raises(DataError, match="no such file"):
        plan_upload(tmp_path, [Path("b")])
