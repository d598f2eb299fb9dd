"""The adapter to vLLM: against a stand-in with the documented classes, and against the package where there is one."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from itertools import count, islice
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from distill_llm.core.errors import ConfigError, TeacherError
from distill_llm.core.example import Example
from distill_llm.models.prompt_tokens import prompt_ids
from distill_llm.tasks.jsonl import Jsonl
from distill_llm.teachers.base import Completion, Failure, Message, Request, Sampling, TeacherFacts, TokenScores
from distill_llm.teachers.vllm import Vllm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from distill_llm.models.load import LoadedModel
    from distill_llm.teachers.base import Prompt

TASK = Jsonl.model_validate({"data": "nowhere.jsonl", "fields": {"input": ["q"]}})
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} . {% endfor %}{% if add_generation_prompt %}so{% endif %}"
)
CHAT = (Message("system", "answer"), Message("user", "who pays more ?"))


@dataclass
class SamplingParams:
    """vLLM's, as far as the adapter may use it: an argument that it does not have is a TypeError."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = 16
    stop: str | list[str] | None = None
    seed: int | None = None
    logprobs: int | None = None


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None


@dataclass
class RequestOutput:
    prompt: str | None
    prompt_token_ids: list[int] | None
    outputs: list[CompletionOutput]
    finished: bool = True


@dataclass
class Call:
    method: str
    prompts: list[Any]
    params: list[SamplingParams]


@dataclass
class Engines:
    """What was made, in which environment, and asked."""

    made: list[dict[str, Any]] = field(default_factory=list)
    environments: list[dict[str, str]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    finish_reason: str = "stop"
    refuses: str = ""


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    """A module ``vllm`` whose models repeat the last word of what they read."""
    seen = Engines()

    class LLM:
        def __init__(self, model: str, *, max_model_len: int | None = None, **options: Any):
            if seen.refuses:
                raise ValueError(seen.refuses)
            seen.made.append({"model": model, "max_model_len": max_model_len, **options})
            seen.environments.append(dict(os.environ))

        def generate(
            self, prompts: list[str], sampling_params: list[SamplingParams], *, use_tqdm: bool = True
        ) -> list[RequestOutput]:
            return self._answer("generate", prompts, sampling_params, [prompt.split() for prompt in prompts])

        def chat(
            self, messages: list[list[dict[str, str]]], sampling_params: list[SamplingParams], use_tqdm: bool = True
        ) -> list[RequestOutput]:
            return self._answer("chat", messages, sampling_params, [chat[-1]["content"].split() for chat in messages])

        def _answer(self, method: str, prompts: Any, params: Any, words: list[list[str]]) -> list[RequestOutput]:
            assert len(prompts) == len(params) > 0
            seen.calls.append(Call(method, prompts, params))
            outputs = []
            for said, one in zip(words, params, strict=True):
                places = None
                if one.logprobs:  # the written token is told although it is not among the likeliest
                    likeliest = {10 + i: Logprob(-1.0 - i, i + 1) for i in range(one.logprobs)}
                    places = [{7: Logprob(-9.5, 40), **likeliest}, {8: Logprob(-0.25, 1), 10: Logprob(-2.0, 2)}]
                written = CompletionOutput(0, f" {said[-1]}\n", [7, 8], None, places, seen.finish_reason)
                outputs.append(RequestOutput(None, list(range(len(said))), [written]))
            return outputs

    module = ModuleType("vllm")
    vars(module).update(LLM=LLM, SamplingParams=SamplingParams, __spec__=ModuleSpec("vllm", None))
    monkeypatch.setitem(sys.modules, "vllm", module)
    return seen


@pytest.fixture
def folder(tiny_llama: Callable[..., LoadedModel], tmp_path: Path) -> Path:
    """A saved decoder-only model of 512 places, with a chat template."""
    model = tiny_llama()
    model.tokenizer.chat_template = TEMPLATE
    model.model.save_pretrained(tmp_path / "big")
    model.tokenizer.save_pretrained(tmp_path / "big")
    return tmp_path / "big"


def _request(number: int, prompt: Prompt = "who pays more ?") -> Request:
    example = Example(id=f"e{number}", input="", prompt="", origin="train", row=number)
    return Request(f"{number + 2**40:x}", example, "train", 0, prompt)


def _open(folder: Path, sampling: Sampling | None = None, seed: int = 0, **fields: Any) -> Any:
    spec = Vllm(model=str(folder), **fields)
    return spec.open(task=TASK, sampling=sampling or Sampling(), seed=seed)


def test_the_engine_is_made_as_the_recipe_says_and_only_when_asked(folder: Path, engines: Engines) -> None:
    fields = {"dtype": "bfloat16", "tensor_parallel_size": 2, "gpu_memory_fraction": 0.5, "context_tokens": 300}
    teacher = _open(folder, Sampling(top_logprobs=30), 5, quantization="fp8", **fields)
    assert engines.made == []
    assert list(teacher.complete([])) == []
    assert engines.made == []
    list(teacher.complete([_request(0)]))
    list(teacher.complete([_request(1)]))
    assert engines.made == [
        {
            "model": str(folder),
            "revision": "main",
            "tokenizer_revision": "main",
            "dtype": "bfloat16",
            "quantization": "fp8",
            "tensor_parallel_size": 2,
            "gpu_memory_utilization": 0.5,
            "max_model_len": 300,
            "max_logprobs": 30,
            "enable_prefix_caching": True,
            "seed": 5,
        }
    ]


def test_what_the_recipe_leaves_open_is_left_to_vllm(folder: Path, engines: Engines) -> None:
    list(_open(folder).complete([_request(0)]))
    left = {"max_model_len": None, "quantization": None, "dtype": "auto", "max_logprobs": 20}
    assert engines.made[0].items() >= left.items()


def test_texts_and_chats_come_back_with_their_requests(folder: Path, engines: Engines) -> None:
    requests = [_request(0, "a b"), _request(1, CHAT), _request(2, "who pays")]
    found = {request.example.id: result for request, result in _open(folder).complete(requests)}
    assert found == {
        "e0": Completion("b", tokens_in=2, tokens_out=2),
        "e1": Completion("?", tokens_in=4, tokens_out=2),
        "e2": Completion("pays", tokens_in=2, tokens_out=2),
    }
    assert [(call.method, call.prompts) for call in engines.calls] == [
        ("generate", ["a b", "who pays"]),
        ("chat", [[{"role": "system", "content": "answer"}, {"role": "user", "content": "who pays more ?"}]]),
    ]


def test_greedy_text_has_no_seed_and_no_top_p(folder: Path, engines: Engines) -> None:
    sampling = Sampling(temperature=0, top_p=0.5, max_new_tokens=9, stop=("Q:",))
    list(_open(folder, sampling).complete([_request(3)]))
    assert engines.calls[0].params == [SamplingParams(0, 1.0, 9, ["Q:"], None, None)]


def test_each_request_draws_by_its_own_key(folder: Path, engines: Engines) -> None:
    sampling = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=9)
    list(_open(folder, sampling).complete([_request(3), _request(4)]))
    assert engines.calls[0].params == [SamplingParams(0.7, 0.9, 9, None, seed, None) for seed in (3, 4)]


@pytest.mark.parametrize(("reason", "cut"), [("stop", False), ("length", True)])
def test_a_completion_that_met_its_limit_is_cut(folder: Path, engines: Engines, reason: str, cut: bool) -> None:
    engines.finish_reason = reason
    ((_, result),) = _open(folder).complete([_request(0)])
    assert result == Completion("?", 4, 2, cut=cut)


def test_what_the_engine_gave_up_is_a_failure(folder: Path, engines: Engines) -> None:
    engines.finish_reason = "abort"
    ((_, result),) = _open(folder).complete([_request(0)])
    assert result == Failure("vLLM ended it early (abort)")


def test_log_probabilities_are_of_the_written_and_the_likeliest_tokens(folder: Path, engines: Engines) -> None:
    ((_, result),) = _open(folder, Sampling(top_logprobs=2)).complete([_request(0)])
    assert engines.calls[0].params[0].logprobs == 2
    assert result.scores == TokenScores((7, 8), (-9.5, -0.25), ((10, 11), (8, 10)), ((-1.0, -2.0), (-0.25, -2.0)))


def test_requests_are_taken_a_window_at_a_time(folder: Path, engines: Engines) -> None:
    """A budget may end them at any time, and what was taken must come back."""
    endless = (_request(number, f"a {number}") for number in count())
    found = list(islice(_open(folder).complete(endless), 1025))
    assert [result.text for _, result in found] == [str(number) for number in range(1025)]
    assert [len(call.prompts) for call in engines.calls] == [1024, 1024]
    assert next(endless).example.id == "e2048"


def test_a_prompt_that_does_not_fit_fails_alone(folder: Path, engines: Engines) -> None:
    requests = [_request(0, "a " * 299 + "b"), _request(1, "a " * 298 + "b"), _request(2, "b")]
    found = {request.example.id: result for request, result in _open(folder, context_tokens=300).complete(requests)}
    assert found["e0"] == Failure("the prompt has 300 tokens, and the model reads 300 with the completion")
    assert [found["e1"].tokens_in, found["e2"].text] == [299, "b"]
    assert [len(call.prompts) for call in engines.calls] == [2]


def test_an_engine_that_cannot_start_says_what_to_do(folder: Path, engines: Engines) -> None:
    engines.refuses = "No available memory for the cache blocks."
    with pytest.raises(TeacherError, match=r"vLLM cannot load .*No available memory .*fewer `context_tokens`"):
        list(_open(folder).complete([_request(0)]))


def test_tokens_are_counted_as_the_model_reads_them(folder: Path) -> None:
    spec = Vllm(model=str(folder))
    assert spec.count_tokens(["a", "who pays more ?", CHAT]) == [1, 4, 4 + 7 + 1]
    assert spec.max_prompt_tokens(Sampling(max_new_tokens=12)) == 500
    assert Vllm(model=str(folder), context_tokens=100).max_prompt_tokens(Sampling(max_new_tokens=12)) == 88


def test_the_tokens_of_a_chat_are_those_of_its_template(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert prompt_ids(tokenizer, CHAT) == prompt_ids(tokenizer, "system : answer . user : who pays more ? . so")


def test_identity_names_weights_and_their_type(folder: Path, tmp_path: Path) -> None:
    plain = _open(folder).identity
    assert plain.startswith("folder@")
    assert plain.endswith(" auto")
    moved = folder.rename(tmp_path / "moved")
    assert _open(moved).identity == plain, "a folder may be moved: its weights name it"
    moved.rename(folder)
    others = [_open(folder, dtype="float16").identity, _open(folder, quantization="fp8").identity]
    assert len({plain, *others}) == 3
    assert _open(folder, gpu_memory_fraction=0.3).identity == plain, "says how it is asked, not what it writes"
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b" ")
    assert _open(folder).identity != plain


def test_facts_are_of_the_folder(folder: Path, tiny_llama: Callable[..., LoadedModel]) -> None:
    size = (folder / "model.safetensors").stat().st_size
    facts = Vllm(model=str(folder), licence="mit").describe()
    assert facts == TeacherFacts(str(folder), tiny_llama().num_parameters, size, "", "mit")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed here")
def test_the_package_is_asked_for_before_anything_else() -> None:
    with pytest.raises(ConfigError, match=r"^rationales\.teacher: .*'vllm'.*pip install 'distill-llm\[vllm\]'"):
        Vllm(model="no/such/model").check(chat=False, sampling=Sampling())


@pytest.mark.usefixtures("engines")
def test_a_model_that_cannot_do_it_is_refused(
    folder: Path, tmp_path: Path, tiny_t5: Callable[..., LoadedModel]
) -> None:
    sampling = Sampling(max_new_tokens=40)
    Vllm(model=str(folder)).check(chat=True, sampling=sampling)
    with pytest.raises(ConfigError, match=r"context_tokens: 40 tokens leave no room .*max_new_tokens \(40\)"):
        Vllm(model=str(folder), context_tokens=40).check(chat=False, sampling=sampling)
    (folder / "chat_template.jinja").unlink()
    Vllm(model=str(folder)).check(chat=False, sampling=sampling)
    with pytest.raises(ConfigError, match="has no chat template"):
        Vllm(model=str(folder)).check(chat=True, sampling=sampling)
    tiny_t5().model.save_pretrained(tmp_path / "t5")
    with pytest.raises(ConfigError, match="is an encoder-decoder, and vLLM runs decoder-only models"):
        Vllm(model=str(tmp_path / "t5")).check(chat=False, sampling=sampling)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    with pytest.raises(ConfigError, match="is an adapter"):
        Vllm(model=str(tmp_path / "adapter")).check(chat=False, sampling=sampling)


def test_replicas_need_as_many_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"2 replicas need .*, and 1 is running\. .*--nproc-per-node 2"):
        _open(folder, data_parallel_size=2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"1 replicas .*4 are running\. .*data_parallel_size=4"):
        _open(folder)


@pytest.mark.parametrize(("visible", "own"), [("0,1,2,3", "2,3"), ("GPU-a,GPU-b,GPU-c,GPU-d,GPU-e", "GPU-c,GPU-d")])
def test_a_replica_sees_its_own_gpus_and_nothing_of_torchrun(
    folder: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch, visible: str, own: str
) -> None:
    launched = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    launched |= {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True", "CUDA_VISIBLE_DEVICES": visible}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANKING_OF_OURS", "kept")
    before = dict(os.environ)
    list(_open(folder, data_parallel_size=2, tensor_parallel_size=2).complete([_request(0)]))
    assert os.environ == before
    assert engines.environments[0].keys() == before.keys() - (launched.keys() - {"CUDA_VISIBLE_DEVICES"})
    assert engines.environments[0]["CUDA_VISIBLE_DEVICES"] == own


@pytest.mark.usefixtures("engines")
def test_too_few_gpus_for_all_replicas_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0,1,2"}.items():
        monkeypatch.setenv(name, value)
    teacher = _open(folder, data_parallel_size=2, tensor_parallel_size=2)
    with pytest.raises(ConfigError, match=r"process 1 of this machine needs 2 GPUs .*the machine offers 3"):
        list(teacher.complete([_request(0)]))


def test_one_process_sees_what_it_saw(folder: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    list(_open(folder, tensor_parallel_size=2).complete([_request(0)]))
    assert engines.environments[0] == dict(os.environ)


@pytest.mark.gpu
def test_the_package_itself_writes_what_the_adapter_expects(
    tiny_llama: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    pytest.importorskip("vllm", reason="vllm is not installed: Linux with a GPU, pip install 'distill-llm[vllm]'")
    model = tiny_llama(hidden_size=128, num_attention_heads=2, num_key_value_heads=2)  # its kernels want wide heads
    model.tokenizer.chat_template = TEMPLATE
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    spec = Vllm(model=str(tmp_path), dtype="bfloat16", gpu_memory_fraction=0.2)
    sampling = Sampling(max_new_tokens=6, top_logprobs=3)
    spec.check(chat=True, sampling=sampling)
    requests = [_request(0, "who pays more ?"), _request(1, CHAT), _request(2, "a b c")]
    found = {r.example.id: c for r, c in spec.open(task=TASK, sampling=sampling, seed=0).complete(requests)}
    lengths = spec.count_tokens([request.prompt for request in requests])
    for number, prompt_tokens in enumerate(lengths or []):
        completion = found[f"e{number}"]
        assert isinstance(completion, Completion)
        assert completion.scores is not None
        assert completion.tokens_in == prompt_tokens
        assert 1 <= completion.tokens_out <= 6
        assert len(completion.scores.tokens) == completion.tokens_out
        best = [max(place) for place in completion.scores.top_logprobs]
        assert completion.scores.logprobs == pytest.approx(best), "greedy: the written token is the likeliest"
