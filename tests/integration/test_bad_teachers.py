"""A teacher that cannot do what the recipe asks: one clear error before the first request, and no key anywhere."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.servers import FaultyProxy, ModelServer, echo_key

pytestmark = pytest.mark.slow
KEY = "sk-of-this-test-alone-0123456789"
SERVED = "rationales.teacher={{kind: openai_compatible, model: {model}, base_url: '{url}', backoff_seconds: 0.01}}"


def _one_error(tmp_path: Path, done: subprocess.CompletedProcess[str], *said: str) -> None:
    """On standard error; and nothing was asked."""
    assert done.stderr.startswith("error: "), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for part in said:
        assert part in done.stderr
    assert not (tmp_path / "runs").exists()


def test_wrong_address_key_and_model(cli: Any, shop: str, tmp_path: Path) -> None:
    with ModelServer(key=KEY) as server:
        words = ("generate-rationales", shop)
        gone = SERVED.format(model="tiny", url="http://127.0.0.1:9/v1")
        done = cli(*words, gone, expect=2, OPENAI_API_KEY=KEY)
        _one_error(tmp_path, done, "rationales.teacher.base_url: cannot connect to http://127.0.0.1:9/v1", "/v1")
        there = SERVED.format(model="tiny", url=server.url)
        done = cli(*words, there, expect=2, OPENAI_API_KEY="sk-of-somebody-else-98765")
        _one_error(tmp_path, done, "variable OPENAI_API_KEY was refused", "HTTP 401")
        assert "sk-of-somebody-else" not in done.stderr
        _one_error(tmp_path, cli(*words, there, expect=2, OPENAI_API_KEY=None), "OPENAI_API_KEY is not set")
        done = cli(*words, SERVED.format(model="tinny", url=server.url), expect=2, OPENAI_API_KEY=KEY)
        _one_error(tmp_path, done, "has no model 'tinny'. Did you mean 'tiny'?")
        assert server.seen == [], "no question was sent"


def test_model_that_takes_no_chat_and_prompts_that_are_too_long(
    cli: Any, shop: str, tmp_path: Path, save_tiny: Any
) -> None:
    folder = save_tiny("llama", text="ann bob buys and . who pays more ? so 1 2 3 + = > <")
    words = ("generate-rationales", shop, f"rationales.teacher={{kind: transformers, model: {folder}}}")
    done = cli(*words, "rationales.prompt.style=chat", expect=2)
    _one_error(tmp_path, done, f"the tokenizer of '{folder}' has no chat template", "rationales.prompt.style: text")
    exemplars = ("rationales.prompt.exemplars=gsm8k", "rationales.sampling.max_new_tokens=8")
    _one_error(tmp_path, cli(*words, *exemplars, expect=2), "the prompt of example 'train-", "takes", "num_exemplars")
    done = cli(*words, "rationales.sampling.max_new_tokens=100000", expect=2)
    _one_error(tmp_path, done, "rationales.sampling.max_new_tokens: 100,000 leaves no room for a prompt")


def test_key_is_in_no_file_and_on_no_screen(cli: Any, shop: str, tmp_path: Path) -> None:
    """A server that repeats the key in its errors, which are then retried, fail, and end the command."""
    with ModelServer(key=KEY) as server:
        with FaultyProxy(server.url, [echo_key(500), None, echo_key(400), None]) as proxy:
            words = ("generate-rationales", shop, SERVED.format(model="tiny", url=proxy.url))
            failed = cli(*words, "rationales.keep=[]", expect=1, OPENAI_API_KEY=KEY)
            assert "1 of 88 requests came to nothing, such as: HTTP 400: bad header" in failed.stderr
            assert "[hidden]" in failed.stderr
            assert "spent: 89 requests, 1 of them retries, 1 failed" in failed.stdout
            done = cli(*words, "rationales.keep=[]", OPENAI_API_KEY=KEY)
            assert "spent: 90 requests" in done.stdout
            assert "of it the last time: 1 requests" in done.stdout
        sent = {seen.headers["authorization"] for seen in server.seen}
        assert sent == {f"Bearer {KEY}"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"journal.jsonl", "README.md", "recipe.yaml", "spent.json"} <= {path.name for path in files}
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
    assert KEY not in failed.stdout + failed.stderr + done.stdout + done.stderr
    assert json.loads((tmp_path / "runs/tiny/rationales/spent.json").read_text())["latest"]["requests"] == 1
