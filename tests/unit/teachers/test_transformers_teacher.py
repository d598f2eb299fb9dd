"""The local teacher: batches say what prompts say alone, samples are their requests's, refusals come early."""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

from distill_llm.core.errors import ConfigError, TeacherError
from distill_llm.core.example import Example
from distill_llm.models.generate import Generator
from distill_llm.tasks.jsonl import Jsonl
from distill_llm.teachers.base import Completion, Failure, Message, Request, Sampling, TeacherFacts
from distill_llm.teachers.transformers import Transformers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from distill_llm.models.load import LoadedModel
    from distill_llm.teachers.base import Prompt

TASK = Jsonl.model_validate({"data": "nowhere.jsonl", "fields": {"input": ["q"]}})
HEAD = "who pays more ? ann pays 7 and bob pays 4 so ann pays more . the answer is ann . " * 2
PROMPTS = [HEAD + text for text in ("who pays more ?", "a", "what costs 3 + 4 ? ann and bob", "b c d", "ann pays 7 so")]
CHAT = (Message("system", "the answer"), Message("user", "who pays more ?"))
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }} : {{ m['content'] }} . {% endfor %}{{ 'so' if add_generation_prompt }}"
)


def _saved(model: LoadedModel, folder: Path) -> Path:
    with torch.no_grad():
        for weight in model.model.parameters():
            if weight.dim() > 1:
                weight.mul_(3.0)  # so that it does not say the same of everything
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tiny_llama: Callable[..., LoadedModel], tmp_path: Path) -> Path:
    return _saved(tiny_llama(seed=4), tmp_path / "llama")


@pytest.fixture
def t5(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> Path:
    return _saved(tiny_t5(seed=4), tmp_path / "t5")


def _spec(folder: Path, **settings: Any) -> Transformers:
    return Transformers.model_validate({"model": str(folder), **settings})


def _sampling(**settings: Any) -> Sampling:
    return Sampling.model_validate({"max_new_tokens": 8} | settings)


def _open(folder: Path, sampling: Sampling | None = None, **settings: Any) -> Any:
    return _spec(folder, **settings).open(task=TASK, sampling=sampling or _sampling(), seed=0)


def _requests(prompts: Sequence[Prompt] = tuple(PROMPTS), samples: int = 1) -> list[Request]:
    example = Example(id="e", input="", prompt="", origin="train", row=0)
    return [
        Request(f"{number:08x}{sample:08x}", example, "train", sample, prompt)
        for number, prompt in enumerate(prompts)
        for sample in range(samples)
    ]


def _answers(teacher: Any, requests: Sequence[Request]) -> list[Any]:
    found = {request.key: answer for request, answer in teacher.complete(iter(requests))}
    assert len(found) == len(requests)
    return [found[request.key] for request in requests]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_model_writes_in_batches_what_it_writes_one_by_one(family: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(family)
    asked = _requests()
    alone = [_answers(_open(folder, batch_rows=1), [one])[0] for one in asked]
    for batch_rows in (1, 2, 32):
        assert _answers(_open(folder, batch_rows=batch_rows), asked) == alone
    assert len({answer.text for answer in alone}) > 1
    assert [answer.tokens_in for answer in alone] == _spec(folder).count_tokens(PROMPTS)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_samples_are_those_of_their_requests(family: str, request: pytest.FixtureRequest) -> None:
    """In other batches, in another order, or half of them after a kill: the same texts."""
    folder, sampling = request.getfixturevalue(family), _sampling(temperature=1.0)
    asked = _requests(samples=4)
    first = _answers(_open(folder, sampling, batch_rows=3), asked)
    assert _answers(_open(folder, sampling, batch_rows=32), asked[::-1]) == first[::-1]
    assert _answers(_open(folder, sampling, batch_rows=5), asked[9:]) == first[9:]
    assert len({answer.text for answer in first[:4]}) == 4, "samples of one prompt differ"


def test_the_longest_prompts_come_first(llama: Path) -> None:
    """What does not fit in memory fails at once, not after an hour."""
    asked = _open(llama, batch_rows=2).complete(_requests())
    assert next(request.prompt for request, _ in asked) == PROMPTS[2]


def test_a_million_requests_are_not_held_at_once(llama: Path) -> None:
    """Some windows of requests are taken, and answered, before the next."""
    taken = itertools.count()

    def endless() -> Iterator[Request]:
        for number in taken:
            yield _requests([PROMPTS[number % 5]])[0]

    answers = _open(llama, _sampling(max_new_tokens=1), batch_rows=2).complete(endless())
    assert len(list(itertools.islice(answers, 5))) == 5
    assert next(taken) <= 64 * 2


def test_the_head_is_read_once_for_all_windows(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import distill_llm.models.generate as generation

    read: list[int] = []
    shared = generation.SharedPrefix

    def counted(model: Any, tokens: tuple[int, ...]) -> Any:
        read.append(len(tokens))
        return shared(model, tokens)

    monkeypatch.setattr(generation, "SharedPrefix", counted)
    teacher = _open(llama, batch_rows=1)
    monkeypatch.setattr(teacher, "_window_rows", 2)
    _answers(teacher, _requests(PROMPTS[:4]))
    assert read == _spec(llama).count_tokens([HEAD])


def test_continuous_batches_write_the_same(llama: Path) -> None:
    spec = _spec(llama, batching="continuous")
    spec.check(chat=False, sampling=_sampling())
    assert _answers(_open(llama, batching="continuous"), _requests()) == _answers(_open(llama), _requests())


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        ({"temperature": 1.0}, "a temperature above 0"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stop": ("Q :",)}, "stop texts"),
    ],
)
def test_continuous_batches_are_refused_where_they_cannot_be(llama: Path, sampling: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"batching: continuous batching does not go with {reason}"):
        _spec(llama, batching="continuous").check(chat=False, sampling=_sampling(**sampling))
    _spec(llama, batching="auto").check(chat=False, sampling=_sampling(**sampling))


def test_batches_are_continuous_by_themselves_on_a_gpu_only(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _open(llama)._continuous
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert _open(llama)._continuous
    assert not _open(llama, device="cpu")._continuous
    assert not _open(llama, batching="static")._continuous
    assert not _open(llama, _sampling(stop=("Q :",)))._continuous


def test_an_encoder_decoder_has_no_continuous_batches(t5: Path) -> None:
    with pytest.raises(ConfigError, match="an encoder-decoder"):
        _spec(t5, batching="continuous").check(chat=False, sampling=_sampling())


def test_a_prompt_that_is_too_long_fails_alone(llama: Path) -> None:
    """It is not cut: what a teacher did not read, it cannot answer. The limits: 512 positions, and the recipe's."""
    long = "a " * 510
    answers = _answers(_open(llama), _requests([PROMPTS[0], long, PROMPTS[1]]))
    assert answers[1] == Failure("the prompt has 510 tokens, the model takes 504")
    assert answers[::2] == _answers(_open(llama), _requests([PROMPTS[0], PROMPTS[1]]))
    assert isinstance(_answers(_open(llama), _requests(["a " * 504]))[0], Completion)
    assert _answers(_open(llama), _requests([""])) == [Failure("the prompt has no tokens")]
    assert _answers(_open(llama, max_input_tokens=3), _requests(["a b c d", long])) == [
        Failure("the prompt has 4 tokens, the model takes 3"),
        Failure("the prompt has 510 tokens, the model takes 3"),
    ]


def test_the_longest_prompt_leaves_room_for_a_completion(llama: Path, t5: Path, tmp_path: Path) -> None:
    from transformers import BartConfig, GPT2Config

    def longest(folder: Path, **settings: Any) -> int | None:
        return _spec(folder, **settings).max_prompt_tokens(_sampling())

    BartConfig(max_position_embeddings=99).save_pretrained(tmp_path / "bart")
    GPT2Config(n_positions=99).save_pretrained(tmp_path / "gpt2")
    assert longest(llama) == 504
    assert longest(llama, max_input_tokens=100) == 100
    assert longest(llama, max_input_tokens=10_000) == 504
    assert longest(tmp_path / "gpt2") == 91
    assert longest(tmp_path / "bart") == 99, "the encoder's; completions are the decoder's"
    assert longest(t5) is None, "relative positions have no end"
    assert longest(t5, max_input_tokens=100) == 100
    with pytest.raises(ConfigError, match="max_new_tokens: 512 leaves no room for a prompt"):
        _spec(llama).check(chat=False, sampling=_sampling(max_new_tokens=512))


def test_stop_texts_cuts_and_scores_reach_the_completion(llama: Path) -> None:
    asked = _requests()
    whole = _answers(_open(llama), asked)
    stop = next(answer.text.split()[2] for answer in whole if len(answer.text.split()) > 2)
    sampling = _sampling(stop=(stop,), top_logprobs=2)
    for before, after in zip(whole, _answers(_open(llama, sampling), asked), strict=True):
        assert after.text == before.text.split(stop)[0].strip()
        assert after.cut == (before.cut and stop not in before.text)
        assert (
            len(after.scores.tokens) == len(after.scores.logprobs) == len(after.scores.top_tokens) == after.tokens_out
        )
        assert all(isinstance(token, int) for token in after.scores.tokens)
        for token, logprob, tokens, top in zip(
            after.scores.tokens, after.scores.logprobs, after.scores.top_tokens, after.scores.top_logprobs, strict=True
        ):
            assert (tokens[0], top[0]) == (token, logprob), "greedy takes the likeliest"
            assert len(tokens) == len(top) == 2
    assert any(answer.cut for answer in whole)


def test_a_chat_is_read_through_the_template(llama: Path) -> None:
    spec = _spec(llama)
    with pytest.raises(ConfigError, match=r"no chat template.*rationales\.prompt\.style"):
        spec.check(chat=True, sampling=_sampling())
    spec.check(chat=False, sampling=_sampling())
    plain = _open(llama).identity
    (llama / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    spec.check(chat=True, sampling=_sampling())
    written = "s : the answer . u : who pays more ? . so"
    assert spec.count_tokens([CHAT, written]) == [13, 13]
    chat, text = _answers(_open(llama), _requests([CHAT, written]))
    assert chat == text
    first = _open(llama).identity
    (llama / "chat_template.jinja").write_text(TEMPLATE.replace("so", "because"), encoding="utf-8")
    assert len({plain, first, _open(llama).identity}) == 3, "another template is another teacher"


def test_identity_holds_what_changes_the_text(
    llama: Path, tiny_llama: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    plain = _open(llama).identity
    assert _open(llama, batch_rows=1, device="cpu", batching="static").identity == plain
    assert Transformers.manner == {"batch_rows", "device", "batching"}
    assert len({plain, _open(llama, dtype="bfloat16").identity, _open(llama, load_in="8bit").identity}) == 3
    _saved(tiny_llama(seed=5), llama)
    assert _open(llama).identity != plain


def test_facts_are_of_the_weights_and_the_card(llama: Path, tiny_llama: Callable[..., LoadedModel]) -> None:
    size = (llama / "model.safetensors").stat().st_size
    found = _spec(llama).describe()
    revision = _open(llama).identity.split("@")[1].split()[0]
    assert found == TeacherFacts(str(llama), tiny_llama(seed=4).num_parameters, size, revision, "")
    (llama / "README.md").write_text("---\nlicense: other\nlicense_name: small-1\n---\n# Card\n", encoding="utf-8")
    assert _spec(llama).describe().licence == "small-1"
    (llama / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a]\n---\n", encoding="utf-8")
    assert _spec(llama).describe().licence == "apache-2.0"
    assert _spec(llama, licence="mine").describe().licence == "mine"
    (llama / "README.md").write_text("---\nlicense: [\n---\n", encoding="utf-8")
    assert _spec(llama).describe().licence == ""


def test_a_licence_on_the_hub_is_read_from_card_or_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.hf_api import ModelInfo

    from distill_llm.models.card import licence_of

    def answers(**info: Any) -> None:
        found = ModelInfo(id="a/b", tags=info.pop("tags", []), **info)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: found)

    assert licence_of("a/b") == "", "no network"
    answers(cardData={"license": "llama3.2"})
    assert licence_of("a/b") == "llama3.2"
    answers(tags=["text-generation", "license:mit"])
    assert licence_of("a/b") == "mit"


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:", "cpu:1", "cuda:99", "mps:0"])
def test_a_device_that_is_not_there_is_refused(llama: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=rf"rationales\.teacher\.device: '{device}' is"):
        _spec(llama, device=device).check(chat=False, sampling=_sampling())


def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from distill_llm.models.load import choose_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", where="x") == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto", where="x") == "cuda:1"
    assert choose_device("cuda", where="x") == "cuda"
    assert choose_device("cpu", where="x") == "cpu"


def test_fewer_bits_need_a_package_and_whole_weights(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _spec(llama, load_in="4bit").check(chat=False, sampling=_sampling())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"load_in.*bitsandbytes.*distill-llm\[quantize\]"):
        _spec(llama, load_in="4bit").check(chat=False, sampling=_sampling())


def test_eight_bit_weights_write_nearly_the_same(llama: Path) -> None:
    pytest.importorskip("bitsandbytes")
    sampling = _sampling(max_new_tokens=1, top_logprobs=1)
    full, few = (_answers(_open(llama, sampling, load_in=bits), _requests()) for bits in ("full", "8bit"))
    for one, other in zip(full, few, strict=True):
        if one.scores.logprobs and other.scores.logprobs:
            assert one.scores.top_logprobs[0][0] == pytest.approx(other.scores.top_logprobs[0][0], abs=0.3)
    assert full != few


class _SmallMemory:
    """A generator on a GPU that holds three rows."""

    def __init__(self) -> None:
        self.tried: list[int] = []

    def share_prefix(self, prompts: Sequence[Sequence[int]]) -> int:
        return 0

    def write_ids(self, prompts: Sequence[Sequence[int]], draws: Sequence[str]) -> list[Any]:
        self.tried.append(len(prompts))
        if len(prompts) > self.rows:
            raise torch.cuda.OutOfMemoryError("too much")
        return [Generator._read(cast("Any", self), ids, len(ids)) for ids in prompts]

    rows = 3
    _ends = ()
    _max_new_tokens = 999
    _stop = ()

    class _tokenizer:
        @staticmethod
        def decode(ids: Any, **_: Any) -> str:
            return str(ids)


def test_a_batch_that_does_not_fit_is_halved_once_for_all(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    teacher, memory = _open(llama, batch_rows=8), _SmallMemory()
    teacher._load = lambda: memory
    asked = _requests(PROMPTS * 2)
    with caplog.at_level(logging.WARNING):
        answers = _answers(teacher, asked)
    assert memory.tried == [8, 4, 2, 2, 2, 2, 2]
    assert [answer.tokens_in for answer in answers] == _spec(llama).count_tokens(PROMPTS * 2)
    assert [record.getMessage() for record in caplog.records if "batch_rows" in record.getMessage()] == [
        "rationales.teacher.batch_rows: 8 rows do not fit in the GPU's memory; going on with 4.",
        "rationales.teacher.batch_rows: 4 rows do not fit in the GPU's memory; going on with 2.",
    ]
    memory.rows = 0
    with pytest.raises(TeacherError, match=r"one prompt of \d+ tokens does not fit"):
        _answers(teacher, asked)
