"""The teacher asks llama.cpp's Python server, whose answers are compared with transformers' for the same weights.

The server has no wheel and is built while it is installed, which takes a C++ compiler and some minutes. Put it into an
environment of its own, and name that one's Python:

    python -m venv ~/llama && ~/llama/bin/pip install "llama-cpp-python[server]==0.3.36" gguf==0.19.0
    DISTILL_LLM_LLAMA_CPP_PYTHON=~/llama/bin/python pytest tests/integration/test_llama_cpp.py

The variable is not needed where the Python that runs the tests has both packages. Without them the tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch

from distill_llm.core.errors import ConfigError
from distill_llm.core.example import Example
from distill_llm.tasks.jsonl import Jsonl
from distill_llm.teachers.base import Completion, Failure, Message, Prompt, Request, Sampling, TokenScores
from distill_llm.teachers.openai_compatible import OpenAICompatible
from tests.conftest import LLAMA_SIZES, build_tiny
from tests.servers import program_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distill_llm.models.load import LoadedModel

VARIABLE = "DISTILL_LLM_LLAMA_CPP_PYTHON"
MODULES = ("llama_cpp", "fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings", "gguf")
NAMES_MISSING = "import sys, importlib.util as u; print(*(name for name in sys.argv[1:] if u.find_spec(name) is None))"


def _find_server() -> tuple[str, str]:
    """A Python with the server and `gguf`, or nothing and the reason."""
    if not [name for name in MODULES if find_spec(name) is None]:
        return sys.executable, ""
    named = os.environ.get(VARIABLE, "")
    if not named:
        return "", f"llama.cpp's Python server is not here; {VARIABLE} may name a Python that has it (see the file)"
    try:
        asked = [Path(named).expanduser(), "-c", NAMES_MISSING, *MODULES]
        missing = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        return "", f"{VARIABLE}: '{named}' does not run as a Python ({error})"
    return ("", f"{VARIABLE}: '{named}' has no {', '.join(missing)}") if missing else (str(asked[0]), "")


PYTHON, WHY_NOT = _find_server() if find_spec("openai") else ("", "the client package openai is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason=WHY_NOT)]

TASK = Jsonl.model_validate({"data": "nowhere.jsonl", "fields": {"input": ["q"]}})
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}so{% endif %}"
)
CHATS: list[Prompt] = [
    "who pays more ?",
    "what costs 3 + 4 ?",
    (Message("system", "explain the reason"), Message("user", "ann pays 7 . who pays ?")),
    (Message("user", "who ?"), Message("assistant", "bob"), Message("user", "because what ?")),
    "Grüße, naïve „quotes“ & 10 % — 日本",
]
TEXTS: list[Prompt] = ["who pays more ? so", "what costs 3 + 4", "a b  c\n\nd", "it's 1234 (ann's)", "Grüße — 日本"]
KEY = "sk-only-for-this-test"
CONTEXT_TOKENS = 256  # llama.cpp rounds up to a multiple of this
TOLERANCE = 2e-4  # nats; both compute in float32, but sum in another order

WRITE = """
import json, sys
import gguf, numpy

facts = json.load(open(sys.argv[1] + "/facts.json", encoding="utf-8"))
weights = numpy.load(sys.argv[1] + "/weights.npz")
writer = gguf.GGUFWriter(sys.argv[2], "llama")
for name in ("context_length", "embedding_length", "block_count", "feed_forward_length", "head_count",
             "head_count_kv", "layer_norm_rms_eps", "rope_dimension_count", "rope_freq_base", "vocab_size",
             "tokenizer_model", "tokenizer_pre", "token_list", "token_types", "token_merges", "eos_token_id",
             "bos_token_id", "add_bos_token", "add_eos_token", "chat_template"):
    getattr(writer, "add_" + name)(facts.pop(name))
assert not facts, facts
for name in weights.files:
    writer.add_tensor(name, weights[name])
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}


class Said(NamedTuple):
    """What transformers writes: text, prompt tokens, new tokens without the end token, whether it was cut."""

    text: str
    tokens_in: int
    tokens_out: int
    cut: bool


@pytest.fixture(scope="module")
def teacher() -> LoadedModel:
    """A tiny Llama whose likely tokens are each a text by themselves."""
    from tokenizers import pre_tokenizers

    # Large weights: what it writes depends on the prompt.
    made = build_tiny(LLAMA_SIZES | {"initializer_range": 1.0, "num_hidden_layers": 2}, seed=3, tokenizer="bytes_bpe")
    # llama.cpp puts no space before a text.
    made.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.tokenizer.chat_template = TEMPLATE
    # The server tells tokens by their texts, and leaves out bytes that are no text. A row of zeros makes those as
    # likely as an average token, which is never among the likeliest.
    broken = [number for number in range(len(made.tokenizer)) if not _text_alone(made, number).isascii()]
    assert len(broken) > 100
    made.model.lm_head.weight.data[[made.tokenizer.pad_token_id, made.tokenizer.unk_token_id, *broken]] = 0
    return made


@pytest.fixture(scope="module")
def url(teacher: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that runs for the tests of this file, with the teacher's weights."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    path = _write_gguf(teacher, folder)
    settings = {"model": path, "model_alias": "tiny", "host": "127.0.0.1", "port": "{port}", "api_key": KEY}
    settings |= {"n_ctx": CONTEXT_TOKENS, "n_threads": 1, "n_threads_batch": 1}
    settings |= {"type_k": 0, "type_v": 0}  # float32, for the comparison; keys and values are halved otherwise
    command = [PYTHON, "-m", "llama_cpp.server", *(f"--{name}={value}" for name, value in settings.items())]
    log = folder / "log.txt"
    with program_server(command, health="/openapi.json", log=log, environment=os.environ) as address:
        yield f"{address}/v1"


@pytest.fixture(autouse=True)
def _with_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_KEY", KEY)


def _write_gguf(teacher: LoadedModel, folder: Path) -> Path:
    """The teacher's weights and tokenizer in llama.cpp's format."""
    config, tokenizer = teacher.model.config, teacher.tokenizer
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    kinds = {tokenizer.pad_token: 3, tokenizer.eos_token: 3, tokenizer.unk_token: 2}  # control, unknown; 1: normal
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    facts = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_dimension_count": config.head_dim,
        "rope_freq_base": config.rope_parameters["rope_theta"],
        "vocab_size": len(tokens),
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "gpt-2",
        "token_list": tokens,
        "token_types": [kinds.get(token, 1) for token in tokens],
        "token_merges": [" ".join(merge) for merge in model["merges"]],
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,  # what is not said would be token 11, an ordinary one
        "add_bos_token": False,
        "add_eos_token": False,
        "chat_template": TEMPLATE,
    }
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    weights: dict[str, Any] = dict(_renamed(teacher))
    np.savez(folder / "weights.npz", **weights)
    path = folder / "tiny.gguf"
    subprocess.run([PYTHON, "-c", WRITE, folder, path], check=True, timeout=60)
    return path


def _renamed(teacher: LoadedModel) -> Iterator[tuple[str, np.ndarray]]:
    """Each weight under llama.cpp's name, with the rows of queries and keys where its rotation expects them."""
    for name, weight in teacher.model.state_dict().items():
        renamed = f".{name}"
        for ours, theirs in NAMES.items():
            renamed = renamed.replace(f".{ours}.", f".{theirs}.")
        rows = weight
        if "q_proj" in name or "k_proj" in name:  # it turns neighbours, transformers turns one half with the other
            heads = weight.view(-1, 2, teacher.model.config.head_dim // 2, weight.size(1))
            rows = heads.transpose(1, 2).reshape(weight.shape)
        yield renamed[1:], rows.numpy()


def _ask(url: str, prompts: list[Prompt], *, sampling: Sampling, first_key: int = 0, **fields: Any) -> list[Any]:
    """What comes of the prompts; ``first_key`` decides the seeds."""
    usual: dict[str, Any] = {"model": "tiny", "api_key_env": "TINY_KEY", "backoff_seconds": 0.01, "concurrency": 3}
    usual["extra"] = {"repeat_penalty": 1.0}  # the server's own default makes repetitions less likely
    spec = OpenAICompatible.model_validate(usual | {"base_url": url} | fields)
    spec.check(chat=spec.api == "chat", sampling=sampling)
    facts: dict[str, Any] = {"input": "", "prompt": "", "origin": "train"}
    requests = [
        Request(f"{first_key + number:016x}", Example(id=f"e{number}", row=number, **facts), "train", 0, prompt)
        for number, prompt in enumerate(prompts)
    ]
    answers = spec.open(task=TASK, sampling=sampling, seed=0).complete(requests)
    found = {request.key: outcome for request, outcome in answers}
    return [found[request.key] for request in requests]


def _text_alone(teacher: LoadedModel, token: int) -> str:
    """What the server calls a token; the end and other special ones have no text."""
    return teacher.tokenizer.decode([token], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _ids(teacher: LoadedModel, prompt: Prompt, api: str) -> torch.Tensor:
    turns = [Message("user", prompt)] if isinstance(prompt, str) else prompt
    said = "".join(f"{turn.role} : {turn.content} " for turn in turns) + "so"
    text = said if api == "chat" else prompt
    return teacher.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


def _by_hand(teacher: LoadedModel, prompts: list[Prompt], count: int, api: str) -> list[Said]:
    """What transformers itself writes after each prompt, alone and without chance."""
    found = []
    for prompt in prompts:
        ids = _ids(teacher, prompt, api)
        with torch.inference_mode():
            new = teacher.model.generate(ids, do_sample=False, max_new_tokens=count)[0, ids.size(1) :].tolist()
        ended = new[-1] == teacher.tokenizer.eos_token_id
        text = teacher.tokenizer.decode(new, skip_special_tokens=True).strip()
        found.append(Said(text, ids.size(1), len(new) - ended, not ended))
    return found


def _facts(outcomes: list[Any]) -> list[Said]:
    assert all(isinstance(outcome, Completion) for outcome in outcomes), outcomes
    return [Said(outcome.text, outcome.tokens_in, outcome.tokens_out, outcome.cut) for outcome in outcomes]


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_the_text_is_what_transformers_writes_with_the_same_weights(url: str, teacher: LoadedModel, api: str) -> None:
    prompts = CHATS if api == "chat" else TEXTS
    expected = _by_hand(teacher, prompts, 24, api)
    assert len({said.text for said in expected}) == len(prompts)
    assert {said.cut for said in expected} == {True, False}
    assert _facts(_ask(url, prompts, sampling=Sampling(max_new_tokens=24), api=api)) == expected


@pytest.mark.parametrize("api", ["completions", "chat"])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_scores_are_the_log_probabilities_that_transformers_gives(
    url: str, teacher: LoadedModel, temperature: float, api: str
) -> None:
    prompts = CHATS if api == "chat" else TEXTS
    sampling = Sampling(max_new_tokens=12, temperature=temperature, top_logprobs=3)
    number_of = {_text_alone(teacher, number): number for number in range(len(teacher.tokenizer))}
    num_unlikely = 0
    for prompt, outcome in zip(prompts, _ask(url, prompts, sampling=sampling, api=api), strict=True):
        scores = outcome.scores
        assert len(scores.tokens) == len(scores.top_tokens) == outcome.tokens_out
        assert "".join(map(str, scores.tokens)).strip() == outcome.text
        written = [number_of[token] for token in scores.tokens]
        expected = _scores_by_hand(teacher, _ids(teacher, prompt, api), written, count=3)
        assert scores.top_tokens == expected.top_tokens
        np.testing.assert_allclose(scores.logprobs, expected.logprobs, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(scores.top_logprobs, expected.top_logprobs, rtol=0, atol=TOLERANCE)
        num_unlikely += sum(token != top[0] for token, top in zip(scores.tokens, scores.top_tokens, strict=True))
    assert (num_unlikely > 0) == (temperature > 0)


def _scores_by_hand(teacher: LoadedModel, prompt: torch.Tensor, written: list[int], *, count: int) -> TokenScores:
    """At temperature 1, in float64 after the model."""
    ids = torch.cat([prompt, torch.tensor([written])], dim=1)
    with torch.inference_mode():
        logits = teacher.model(ids).logits[0, prompt.size(1) - 1 : -1].double()
    every = logits - logits.exp().sum(-1, keepdim=True).log()
    top = every.topk(count)
    return TokenScores(
        tuple(_text_alone(teacher, number) for number in written),
        tuple(every[range(len(written)), written].tolist()),
        tuple(tuple(_text_alone(teacher, number) for number in place) for place in top.indices.tolist()),
        tuple(tuple(place) for place in top.values.tolist()),
    )


def test_stop_string_ends_a_text_and_more_room_changes_only_what_was_cut(url: str, teacher: LoadedModel) -> None:
    (whole,) = _by_hand(teacher, TEXTS[:1], 24, "completions")
    assert whole.cut
    stop = whole.text[10:12]
    sampling = Sampling(max_new_tokens=24, stop=("never written", stop))
    (stopped,) = _ask(url, TEXTS[:1], sampling=sampling, api="completions")
    assert stopped.text == whole.text.partition(stop)[0].strip()
    assert not stopped.cut
    assert 0 < stopped.tokens_out < whole.tokens_out
    (short,) = _ask(url, TEXTS[:1], sampling=Sampling(max_new_tokens=5), api="completions")
    assert _facts([short]) == _by_hand(teacher, TEXTS[:1], 5, "completions")
    assert short.cut
    assert whole.text.startswith(short.text)


def test_a_draw_depends_on_its_key_alone(url: str) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=1.0)
    same = TEXTS[:1] * 6
    first = [outcome.text for outcome in _ask(url, same, sampling=sampling, api="completions")]
    assert len(set(first)) > 3
    alone = [
        _ask(url, same[:1], sampling=sampling, api="completions", concurrency=1, first_key=number)[0].text
        for number in reversed(range(6))
    ]
    assert first == alone[::-1]


def test_prompt_that_is_too_long_fails_alone_with_the_servers_reason(url: str, teacher: LoadedModel) -> None:
    prompts: list[Prompt] = [TEXTS[0], "who pays ? " * CONTEXT_TOKENS, TEXTS[1]]
    before, long, after = _ask(url, prompts, sampling=Sampling(max_new_tokens=6), api="completions")
    assert _facts([before, after]) == _by_hand(teacher, [TEXTS[0], TEXTS[1]], 6, "completions")
    assert isinstance(long, Failure)
    assert f"maximum context length is {CONTEXT_TOKENS} tokens" in long.reason
    assert long.retries == 0


def test_text_ends_where_the_context_is_full(url: str, teacher: LoadedModel) -> None:
    prompts: list[Prompt] = ["who pays ? " * 60]
    (said,) = _facts(_ask(url, prompts, sampling=Sampling(max_new_tokens=500), api="completions"))
    assert said.cut
    assert said.tokens_in + said.tokens_out == CONTEXT_TOKENS
    assert [said] == _by_hand(teacher, prompts, said.tokens_out, "completions")


def test_wrong_key_and_wrong_model_are_found_out_before_the_first_question(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"rationales\.teacher\.model: .*tiny"):
        _ask(url, TEXTS, sampling=Sampling(), model="tinny", api="completions")
    monkeypatch.setenv("TINY_KEY", "sk-another")
    with pytest.raises(ConfigError, match=r"HTTP 401: .*Invalid API key.*TINY_KEY was refused"):
        _ask(url, TEXTS, sampling=Sampling(), api="completions")


def test_servers_own_penalty_must_be_set_to_one_in_extra(url: str, teacher: LoadedModel) -> None:
    plain = _by_hand(teacher, TEXTS, 24, "completions")
    found = _facts(_ask(url, TEXTS, sampling=Sampling(max_new_tokens=24), api="completions", extra={}))
    assert found != plain
