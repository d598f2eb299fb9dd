"""Teachers of text: replayed, gold, and a local model whose batches say what its prompts say alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from distill_llm.core.errors import ConfigError, TeacherError
from distill_llm.core.example import Example
from distill_llm.core.files import Journal
from distill_llm.core.progress import SILENT
from distill_llm.rationales.generate import complete
from distill_llm.rationales.parse import Parsed, parse
from distill_llm.tasks.jsonl import Jsonl
from distill_llm.teachers.base import Completion, Request, Sampling, TeacherFacts
from distill_llm.teachers.gold import Gold
from distill_llm.teachers.replay import Replay
from distill_llm.teachers.transformers import Transformers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from distill_llm.models.load import LoadedModel

TASK = Jsonl.model_validate({"data": "nowhere.jsonl", "fields": {"input": ["q"]}})
PROMPTS = ["who pays more ?", "a", "what costs 3 + 4 ? ann and bob", "b c d", "ann pays 7 so"]


def _request(number: int, *, sample: int = 0, prompt: str = "", **example: Any) -> Request:
    facts: dict[str, Any] = {"id": f"e{number}", "input": "", "prompt": "", "origin": "train", "row": number}
    return Request(f"key {number} {sample}", Example(**(facts | example)), "train", sample, prompt)


def _replay(folder: Path, **files: str) -> Any:
    spec = Replay.model_validate({"name": "big", "files": {k: str(folder / v) for k, v in files.items()}})
    return spec.open(task=TASK, sampling=Sampling(), seed=0)


def _texts(teacher: Any, requests: Sequence[Request]) -> list[str]:
    found = {request.key: completion.text for request, completion in teacher.complete(requests)}
    return [found[request.key] for request in requests]


def test_replay_takes_the_row_of_the_split_that_the_example_came_from(tmp_path: Path) -> None:
    """The source's own split and row: validation may have been cut from train, and train cut short."""
    for number in (1, 2, 10):
        (tmp_path / f"part_{number}.json").write_text(json.dumps([f"{number} a", f"{number} b"]))
    (tmp_path / "test.json").write_text('["t0"]')
    teacher = _replay(tmp_path, train="part_*.json", test="test.json")
    requests = [_request(4), _request(0), _request(3), _request(0, sample=1, origin="test")]
    assert _texts(teacher, requests) == ["10 a", "1 a", "2 b", "t0"]


def test_replay_says_which_row_has_no_completion(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text('["one"]')
    teacher = _replay(tmp_path, train="train.json")
    with pytest.raises(TeacherError, match="the train split has a row 3, but only 1"):
        _texts(teacher, [_request(2)])
    with pytest.raises(TeacherError, match="the test split has a row 1, but only 0"):
        _texts(teacher, [_request(0, origin="test")])


def test_other_texts_are_another_teacher(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text('["one"]')
    before = _replay(tmp_path, train="train.json").identity
    (tmp_path / "train.json").write_text('["two"]')
    assert _replay(tmp_path, train="train.json").identity != before


@pytest.mark.parametrize("content", ['{"a": "b"}', "[1]", "[", '[["a"]]'])
def test_replay_wants_lists_of_texts(tmp_path: Path, content: str) -> None:
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(ConfigError, match=r"rationales\.teacher\.files\.train"):
        _replay(tmp_path, train="train.json")
    with pytest.raises(ConfigError, match="no file matches"):
        _replay(tmp_path, train="none_*.json")


def test_gold_is_the_datas_rationale_and_an_answer_that_is_read_back() -> None:
    teacher = Gold().open(task=TASK, sampling=Sampling(), seed=0)
    request = _request(0, rationale="One and one is two.", label="2")
    assert _texts(teacher, [request]) == ["One and one is two. The answer is 2."]
    assert parse(_texts(teacher, [request])[0], TASK, request.example) == Parsed("One and one is two.", "2")


@pytest.mark.parametrize(("known", "missing"), [({"label": "2"}, "rationale"), ({"rationale": "r"}, "label")])
def test_gold_without_gold_says_what_is_missing(known: dict[str, str], missing: str) -> None:
    teacher = Gold().open(task=TASK, sampling=Sampling(), seed=0)
    with pytest.raises(TeacherError, match=f"example 'e7' has no {missing}"):
        _texts(teacher, [_request(7, **known)])


def _open(folder: Path, *, batch_rows: int, seed: int = 0, **sampling: Any) -> Any:
    spec = Transformers(model=str(folder), batch_rows=batch_rows)
    return spec.open(task=TASK, sampling=Sampling(**({"max_new_tokens": 8} | sampling)), seed=seed)


def _saved(model: LoadedModel, folder: Path) -> Path:
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def test_a_model_writes_in_batches_what_it_writes_one_by_one(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    folder = _saved(tiny_model(seed=4), tmp_path / "big")
    requests = [_request(i, prompt=prompt) for i, prompt in enumerate(PROMPTS)]
    alone = {r.key: c for r, c in _open(folder, batch_rows=1).complete(requests)}
    for batch_rows in (2, 32):
        assert {r.key: c for r, c in _open(folder, batch_rows=batch_rows).complete(requests)} == alone
    assert len({completion.text for completion in alone.values()}) > 1
    assert [alone[request.key].tokens_in for request in requests] == [4, 1, 9, 3, 4]


def test_the_longest_prompts_come_first(tiny_llama: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """What does not fit in memory fails at once, not after an hour."""
    teacher = _open(_saved(tiny_llama(), tmp_path / "big"), batch_rows=2)
    requests = [_request(i, prompt=prompt) for i, prompt in enumerate(PROMPTS)]
    assert next(request.prompt for request, _ in teacher.complete(requests)) == PROMPTS[2]


def test_identity_and_facts_are_of_the_weights(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    model = tiny_t5(seed=1)
    folder = _saved(model, tmp_path / "big")
    before = _open(folder, batch_rows=1).identity
    size = (folder / "model.safetensors").stat().st_size
    assert Transformers(model=str(folder)).describe() == TeacherFacts(str(folder), model.num_parameters, size)
    _saved(tiny_t5(seed=2), folder)
    assert _open(folder, batch_rows=1).identity != before


def test_sampling_is_repeatable_and_follows_the_seed(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    folder = _saved(tiny_t5(seed=4), tmp_path / "big")
    requests = [_request(i, sample=s, prompt=PROMPTS[0]) for i in range(2) for s in range(3)]
    first = _texts(_open(folder, batch_rows=2, temperature=1.0, seed=1), requests)
    assert _texts(_open(folder, batch_rows=2, temperature=1.0, seed=1), requests) == first
    assert _texts(_open(folder, batch_rows=2, temperature=1.0, seed=2), requests) != first
    assert len(set(first)) == 6, "samples of one prompt are drawn apart, in and between batches"


def test_a_resumed_run_draws_new_samples(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """Killed after the first samples of a prompt, the next run must not draw the same ones again: a vote would count
    one completion twice."""
    folder = _saved(tiny_t5(seed=4), tmp_path / "big")
    requests = [_request(0, sample=sample, prompt=PROMPTS[0]) for sample in range(4)]
    path = tmp_path / "journal.jsonl"
    complete(requests[:2], _open(folder, batch_rows=2, temperature=1.0), Journal(path), SILENT, "before the kill")
    found = complete(requests, _open(folder, batch_rows=2, temperature=1.0), Journal(path), SILENT, "after it")
    assert len({completion.text for completion in found.values()}) == 4


def test_a_completion_needs_no_token_counts() -> None:
    assert Completion("text") == Completion("text", 0, 0)
