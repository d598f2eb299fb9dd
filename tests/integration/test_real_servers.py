"""The teacher asks a real server, `transformers serve`, directly and through a proxy that breaks what passes."""

from __future__ import annotations

import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from distill_llm.core.errors import TeacherError
from distill_llm.core.example import Example
from distill_llm.tasks.jsonl import Jsonl
from distill_llm.teachers.base import Completion, Message, Prompt, Request, Sampling
from distill_llm.teachers.openai_compatible import OpenAICompatible
from tests.conftest import LLAMA_SIZES, build_tiny
from tests.servers import FaultyProxy, body, cut_off, hang, program_server, reset, status, truncated

if TYPE_CHECKING:
    from collections.abc import Iterator

_MISSING = [name for name in ("openai", "fastapi", "uvicorn") if find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(_MISSING), reason=f"`transformers serve` needs {_MISSING}, which are not installed"),
]

TASK = Jsonl.model_validate({"data": "nowhere.jsonl", "fields": {"input": ["q"]}})
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}so {% endif %}"
)
CHATS: list[Prompt] = [
    "who pays more ?",
    "what costs 3 + 4 ?",
    (Message("system", "explain the reason"), Message("user", "ann pays 7 . who pays ?")),
    (Message("user", "who ?"), Message("assistant", "bob"), Message("user", "because what ?")),
    "a b c d",
    "bob costs 5 and ann 6",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a chat template."""
    # Large weights: what it writes depends on the prompt. Bytes: transformers takes no stop string with whole words.
    made = build_tiny(LLAMA_SIZES | {"initializer_range": 1.0}, seed=3, tokenizer="bytes_bpe")
    made.tokenizer.chat_template = TEMPLATE
    path = tmp_path_factory.mktemp("served") / "llama"
    made.model.save_pretrained(path)
    made.tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """The address of a server that runs for the tests of this file."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(folder.parent / "cache")}
    program = Path(sys.executable).with_name("transformers")
    command = [program, "serve", folder, "--host", "127.0.0.1", "--device", "cpu", "--port", "{port}"]
    log = folder.parent / "log.txt"
    with program_server(command, health="/health", log=log, environment=environment) as address:
        yield f"{address}/v1"


def _ask(address: str, model: Path, prompts: list[Prompt], *, sampling: Sampling, **fields: Any) -> list[Any]:
    usual: dict[str, Any] = {"model": str(model), "api_key_env": "NO_SUCH_KEY", "backoff_seconds": 0.01}
    spec = OpenAICompatible.model_validate(usual | {"base_url": address, "concurrency": 3} | fields)
    spec.check(chat=spec.api == "chat", sampling=sampling)
    facts: dict[str, Any] = {"input": "", "prompt": "", "origin": "train"}
    requests = [
        Request(f"{number:016x}", Example(id=f"e{number}", row=number, **facts), "train", 0, prompt)
        for number, prompt in enumerate(prompts)
    ]
    teacher = spec.open(task=TASK, sampling=sampling, seed=0)
    found = {request.key: outcome for request, outcome in teacher.complete(requests)}
    return [found[request.key] for request in requests]


def _by_hand(model: Path, prompts: list[Prompt], count: int, *, chat: bool) -> list[tuple[str, int, int]]:
    """Text, prompt tokens and new tokens that transformers itself gives for each prompt alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    lm: Any = AutoModelForCausalLM.from_pretrained(model)
    found = []
    for prompt in prompts:
        turns = [Message("user", prompt)] if isinstance(prompt, str) else prompt
        said = "".join(f"{turn.role} : {turn.content} " for turn in turns) + "so "
        ids = tokenizer(said if chat else prompt, add_special_tokens=not chat, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            new = lm.generate(ids, do_sample=False, max_new_tokens=count, pad_token_id=0)[0, ids.size(1) :]
        found.append((tokenizer.decode(new, skip_special_tokens=True).strip(), ids.size(1), len(new)))
    return found


def _facts(outcomes: list[Any]) -> list[tuple[str, int, int]]:
    assert all(isinstance(outcome, Completion) for outcome in outcomes), outcomes
    return [(outcome.text, outcome.tokens_in, outcome.tokens_out) for outcome in outcomes]


def test_chats_get_the_text_that_the_model_writes_without_a_server(url: str, folder: Path) -> None:
    found = _ask(url, folder, CHATS, sampling=Sampling(max_new_tokens=12))
    expected = _by_hand(folder, CHATS, 12, chat=True)
    assert _facts(found) == expected
    assert len({text for text, _, _ in expected}) > 2
    assert [outcome.cut for outcome in found] == [tokens == 12 for _, _, tokens in expected]


def test_plain_text_is_gone_on_with(url: str, folder: Path) -> None:
    prompts: list[Prompt] = ["who pays more ? so", "what costs 3 + 4"]
    found = _ask(url, folder, prompts, sampling=Sampling(max_new_tokens=9), api="completions")
    assert _facts(found) == _by_hand(folder, prompts, 9, chat=False)


def test_stop_string_ends_a_text(url: str, folder: Path) -> None:
    (whole,) = _ask(url, folder, CHATS[:1], sampling=Sampling(max_new_tokens=12))
    stop = re.findall(r"[a-z0-9]{2,}", whole.text)[-1]
    (found,) = _ask(url, folder, CHATS[:1], sampling=Sampling(max_new_tokens=12, stop=(stop,)))
    assert found.text == whole.text.partition(stop)[0].strip() != whole.text
    assert found.tokens_out < whole.tokens_out or whole.text.endswith(stop)


def test_faults_on_the_way_change_no_text(url: str, folder: Path) -> None:
    no_choice = body({"choices": []})
    faults = [
        status(429, headers={"Retry-After": "1"}),
        None,
        status(429),
        reset,
        truncated,
        None,
        hang,
        status(500),
        cut_off,
        no_choice,
    ]
    with FaultyProxy(url, faults) as proxy:
        found = _ask(proxy.url, folder, CHATS, sampling=Sampling(max_new_tokens=12), timeout_seconds=6.0)
        assert proxy.arrivals == len(CHATS) + 8
    assert _facts(found) == _by_hand(folder, CHATS, 12, chat=True)
    assert sum(outcome.retries for outcome in found) == 8


def test_server_without_log_probabilities_is_found_out(url: str, folder: Path) -> None:
    with pytest.raises(TeacherError, match=r"gives no log-probabilities.*top_logprobs: 0"):
        _ask(url, folder, CHATS, sampling=Sampling(max_new_tokens=4, top_logprobs=2))


def test_model_that_is_not_served_is_the_servers_reason(url: str, folder: Path) -> None:
    with pytest.raises(TeacherError, match=r"10 requests in a row.*Server is pinned to"):
        _ask(url, folder.parent / "other", CHATS * 3, sampling=Sampling(max_new_tokens=4))
