"""The generation loop against one token at a time by hand: padding, shared prefixes, stops, scores, random numbers."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from distill_llm.models import generate as generation
from distill_llm.models.generate import Generator, Written
from distill_llm.models.load import build_student, load_tokenizer
from distill_llm.models.prefix import can_share_prefix, common_prefix, has_plain_cache
from distill_llm.models.sampling import draw, uniforms
from distill_llm.models.spec import StudentSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from distill_llm.models.load import LoadedModel

TEXTS = ["who pays more ?", "a", "what costs 3 + 4 ? ann and bob", "b c d"]
HEAD = "who pays more ? ann pays 7 and bob pays 4 so ann pays more . the answer is ann . " * 2
PROMPTS = [HEAD + text for text in TEXTS]
KEYS = [f"{number:016x}" for number in range(100, 112)]

LIKE_LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": LIKE_LLAMA | {"num_key_value_heads": 2},
    "mistral": LIKE_LLAMA | {"num_key_value_heads": 2, "sliding_window": None, "head_dim": 4},
    "mistral with a window": LIKE_LLAMA | {"num_key_value_heads": 2, "sliding_window": 8, "head_dim": 4},
    "qwen2": LIKE_LLAMA | {"num_key_value_heads": 1},
    "qwen3": LIKE_LLAMA | {"num_key_value_heads": 2, "head_dim": 8},
    "gemma": LIKE_LLAMA | {"num_key_value_heads": 1, "head_dim": 8},
    "cohere": LIKE_LLAMA | {"num_key_value_heads": 4},
    "gpt_neox": LIKE_LLAMA,
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 4},
}


def _built(model_type: str, sizes: dict[str, Any]) -> LoadedModel:
    spec = StudentSpec.model_validate({"config": {"model_type": model_type, **sizes}, "tokenizer": {"kind": "words"}})
    torch.manual_seed(4)
    model = build_student(spec, load_tokenizer(spec, PROMPTS))
    model.model.eval()
    return model


def _generator(model: LoadedModel, **options: Any) -> Generator:
    return Generator(model.model, model.tokenizer, **({"max_new_tokens": 6} | options))


def _ids(model: LoadedModel, texts: Sequence[str]) -> list[list[int]]:
    return model.tokenizer(list(texts))["input_ids"]


def _logits(model: LoadedModel, ids: list[int], written: Sequence[int]) -> torch.Tensor:
    """At each place after the prompt, by one full forward pass without padding or cache."""
    with torch.no_grad():
        if model.is_encoder_decoder:
            decoder = torch.tensor([[0, *written]])
            return model.model(input_ids=torch.tensor([ids]), decoder_input_ids=decoder).logits[0]
        return model.model(input_ids=torch.tensor([[*ids, *written]]), use_cache=False).logits[0, len(ids) - 1 :]


def _greedy(model: LoadedModel, ids: list[int], count: int) -> list[int]:
    """The likeliest token, again and again, until one ends the text."""
    written: list[int] = []
    while len(written) < count:
        token = int(_logits(model, ids, written)[-1].argmax())
        if token in (model.tokenizer.eos_token_id, model.tokenizer.pad_token_id):
            break
        written.append(token)
    return written


def _spread(model: LoadedModel, factor: float = 6.0) -> LoadedModel:
    """Larger weights, so that what a model attends to decides what it says; and it never ends a text by itself."""
    with torch.no_grad():
        for weight in model.model.parameters():
            if weight.dim() > 1:
                weight.mul_(factor)
        model.model.get_output_embeddings().weight[:2] = 0.0
    return model


def test_a_batch_is_written_as_each_text_alone_by_hand(tiny_model: Callable[..., LoadedModel]) -> None:
    """Texts of 1 to 8 tokens: a decoder is padded on the left, an encoder on the right."""
    model = _spread(tiny_model(seed=4), 2.0)
    batch = _generator(model).write(TEXTS)
    for ids, one in zip(_ids(model, TEXTS), batch, strict=True):
        expected = _greedy(model, ids, 6)
        assert one.ids == tuple(expected)
        assert (one.tokens_in, one.tokens_out) == (len(ids), len(expected))
        assert one.text == model.tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert one.cut == (len(expected) == 6)
    assert len({one.ids for one in batch}) > 1, "texts that all end alike would prove little"
    assert batch == [_generator(model).write([text])[0] for text in TEXTS]
    assert batch == _generator(model).write_ids(_ids(model, TEXTS))


@pytest.mark.parametrize("name", DECODERS)
def test_a_shared_prefix_that_is_read_once_changes_no_text(name: str) -> None:
    """Rows of unlike lengths behind it: positions go on, and the gap between is masked out."""
    model = _spread(_built(name.split(maxsplit=1)[0], DECODERS[name]))
    ids = _ids(model, PROMPTS)
    plain = _generator(model, max_new_tokens=40).write_ids(ids)
    generator = _generator(model, max_new_tokens=40)
    size = generator.share_prefix(ids)
    assert size == (len(common_prefix(ids)) if has_plain_cache(model.model) else 0)
    assert generator.write_ids(ids) == plain
    assert generator.write_ids(ids[:3]) == plain[:3], "the first batch left the prefix as it was"
    assert plain == [generator.write_ids([one])[0] for one in ids]
    assert [one.ids for one in plain] == [tuple(_greedy(model, one, 40)) for one in ids]
    assert len({one.ids for one in plain}) > 2


def test_which_models_share_a_prefix(
    tiny_llama: Callable[..., LoadedModel], tiny_t5: Callable[..., LoadedModel]
) -> None:
    def kinds(**sizes: Any) -> tuple[bool, bool]:
        model = tiny_llama(**sizes).model
        return has_plain_cache(model), can_share_prefix(model)

    assert kinds() == (True, True)
    assert kinds(model_type="cohere") == (True, False)
    assert kinds(model_type="mistral", sliding_window=8)[0] is False
    assert kinds(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})[0] is False
    assert has_plain_cache(tiny_t5().model) is False


def test_a_prefix_is_kept_while_prompts_begin_with_it(tiny_llama: Callable[..., LoadedModel]) -> None:
    model = tiny_llama(seed=4)
    generator = _generator(model)
    ids = _ids(model, PROMPTS)
    assert generator.share_prefix(ids) == len(_ids(model, [HEAD])[0])
    first = generator._prefix
    assert generator.share_prefix(_ids(model, [HEAD + "e f", HEAD + "e g"])) == len(_ids(model, [HEAD])[0])
    assert generator._prefix is first, "one token more is not worth reading all of it again"
    assert generator.share_prefix(_ids(model, TEXTS)) == 0
    assert generator._prefix is None
    generator.share_prefix(ids)
    others = _ids(model, [*TEXTS, HEAD])
    assert generator.write_ids(others) == _generator(model).write_ids(others), "prompts without it are written whole"


@pytest.mark.parametrize(
    ("prompts", "prefix"),
    [([[1, 2, 3], [1, 2, 4]], (1, 2)), ([[1, 2], [1, 2]], (1,)), ([[1], [1, 2]], ()), ([], ()), ([[2], [1]], ())],
)
def test_a_common_prefix_leaves_a_token_to_each(prompts: list[list[int]], prefix: tuple[int, ...]) -> None:
    assert common_prefix(prompts) == prefix


def test_rows_that_ended_are_dropped_and_the_others_go_on(
    tiny_llama: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With scores and random numbers, which must stay with their rows."""
    model = _spread(tiny_llama(seed=4), 3.0)
    options = {"max_new_tokens": 30, "temperature": 1.0, "top_logprobs": 2, "stop": ("7", "ann")}
    ids = _ids(model, TEXTS * 3)
    whole = [_generator(model, **options).write_ids([one], [key])[0] for one, key in zip(ids, KEYS, strict=True)]
    monkeypatch.setattr(generation, "_STEPS", 4)
    widths: list[int] = []
    made = model.model.generate

    def counted(**inputs: Any) -> Any:
        widths.append(len(inputs["input_ids"]))
        return made(**inputs)

    monkeypatch.setattr(model.model, "generate", counted)
    found = _generator(model, **options).write_ids(ids, KEYS)
    assert [(one.text, one.ids, one.cut) for one in found] == [(one.text, one.ids, one.cut) for one in whole]
    for one, alone in zip(found, whole, strict=True):
        assert one.scores is not None
        assert alone.scores is not None
        np.testing.assert_allclose(one.scores.logprobs, alone.scores.logprobs, atol=1e-4)
    assert widths[0] == 12
    assert 0 < widths[-1] < 12
    assert len({one.tokens_out for one in whole}) > 3


@pytest.mark.parametrize("tokenizer", ["words", "bytes_bpe"])
def test_a_stop_text_ends_the_writing_and_is_left_out(tiny_llama: Callable[..., LoadedModel], tokenizer: str) -> None:
    model = _spread(tiny_llama(seed=4, tokenizer=tokenizer), 3.0)
    whole = _generator(model, max_new_tokens=24).write(TEXTS)
    stop = whole[0].text[len(whole[0].text) // 2 :][:3]
    generator = _generator(model, max_new_tokens=24, stop=(stop, "no such text"))
    stopped = generator.write(TEXTS)
    for one, without in zip(stopped, whole, strict=True):
        assert one.text == without.text.split(stop)[0].strip()
        assert one.ids == without.ids[: one.tokens_out]
        assert one.cut == (stop not in without.text and without.cut)
    assert stopped[0].tokens_out < whole[0].tokens_out
    assert stopped == [generator.write([text])[0] for text in TEXTS]
    asked = [f"{stop} {text}" for text in TEXTS]
    after = [one.text.split(stop)[0].strip() for one in _generator(model, max_new_tokens=24).write(asked)]
    assert [one.text for one in generator.write(asked)] == after, "a stop text in the prompt stops nothing"
    assert any(after)


def test_the_earliest_stop_text_cuts_whichever_is_named_first(tiny_llama: Callable[..., LoadedModel]) -> None:
    model = tiny_llama()
    ids = _ids(model, ["ann pays 7 . bob pays 4 ."])[0]
    read = _generator(model, max_new_tokens=len(ids), stop=("bob", "7 ."))._read
    assert (read(ids, 3).text, read(ids, 3).tokens_out, read(ids, 3).cut) == ("ann pays", 2, False)
    at_once = _generator(model, stop=("ann",))._read(ids, 3)
    assert at_once == Written("", 3, 0)


def test_the_end_of_sequence_ends_the_writing(tiny_t5: Callable[..., LoadedModel]) -> None:
    """Rows that ended go on as padding, which is neither shown nor counted."""
    model = tiny_t5(seed=4)
    pays = model.tokenizer("ann pays")["input_ids"]
    read = _generator(model, max_new_tokens=5)._read
    assert read([*pays, 1, 0, 0], 5) == Written("ann pays", 5, 2, ids=tuple(pays), end=1)
    assert read([1, 0], 5) == Written("", 5, 0, end=1)
    assert read(pays, 5) == Written("ann pays", 5, 2, ids=tuple(pays))
    assert read([*pays, *pays, pays[0]], 5).cut
    assert not read([*pays, *pays, 1], 5).cut


def test_each_end_token_of_the_model_ends_a_text(tiny_llama: Callable[..., LoadedModel]) -> None:
    """Chat models name the end of a turn beside the end of a text."""
    model = _spread(tiny_llama(seed=4), 3.0)
    (whole,) = _generator(model).write(["b c d"])
    model.model.generation_config.eos_token_id = [1, whole.ids[3]]
    expected = whole.ids[: whole.ids.index(whole.ids[3])]
    (ended,) = _generator(model).write(["b c d"])
    assert (ended.ids, ended.cut) == (expected, False)


def test_the_model_s_own_sampling_and_penalties_do_not_hold(tiny_llama: Callable[..., LoadedModel]) -> None:
    """A recipe says all that decides the text, and a penalty would count the few-shot prompt too."""
    model = _spread(tiny_llama(seed=4), 3.0)
    plain = _generator(model, max_new_tokens=20).write(TEXTS)
    assert any(len(set(one.ids)) < len(one.ids) for one in plain), "nothing is said twice: a penalty could not be seen"
    config = model.model.generation_config
    config.repetition_penalty, config.no_repeat_ngram_size, config.min_new_tokens = 9.0, 1, 3
    config.do_sample, config.temperature, config.top_k, config.max_length = True, 2.0, 5, 3
    assert _generator(model, max_new_tokens=20).write(TEXTS) == plain


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_p": 0.8}, {"stop": ("7", "b")}])
def test_log_probabilities_are_those_of_a_full_forward_pass(
    tiny_model: Callable[..., LoadedModel], options: dict[str, Any]
) -> None:
    """At temperature 1, whatever the text was drawn at, and of the tokens of the text only."""
    model = _spread(tiny_model(seed=4), 2.0)
    generator = _generator(model, max_new_tokens=12, top_logprobs=3, **options)
    ids = _ids(model, PROMPTS)
    generator.share_prefix(ids)
    for prompt, one in zip(ids, generator.write_ids(ids, KEYS[:4]), strict=True):
        assert one.scores is not None
        assert len(one.scores.logprobs) == len(one.scores.top_tokens) == one.tokens_out
        expected = _logits(model, prompt, one.ids)[: one.tokens_out].double().log_softmax(-1)
        top = expected.topk(3)
        assert one.scores.top_tokens == [tuple(row) for row in top.indices.tolist()]
        own = expected[range(one.tokens_out), list(one.ids)]
        torch.testing.assert_close(torch.tensor(one.scores.logprobs).double(), own, atol=1e-4, rtol=0)
        found = torch.tensor(one.scores.top_logprobs).double().view(-1, 3)
        torch.testing.assert_close(found, top.values, atol=1e-4, rtol=0)


def test_a_draw_is_where_the_cumulative_probability_passes_its_number() -> None:
    scores = torch.tensor([[0.1, 0.0, 0.4, 0.5, 0.0]]).log().expand(6, -1)
    numbers = torch.tensor([0.0, 0.09, 0.11, 0.49, 0.51, 1 - 1e-12], dtype=torch.float64)
    assert draw(scores, numbers).tolist() == [0, 0, 2, 2, 3, 3]
    certain = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    assert draw(certain, torch.zeros(1, dtype=torch.float64)).tolist() == [1]


def test_random_numbers_are_uniform_and_belong_to_their_key() -> None:
    numbers = np.array([uniforms(f"{key:016x}", 8) for key in range(2000)])
    assert (numbers[3, :4] == uniforms(f"{3:016x}", 4)).all(), "a longer text begins with the same numbers"
    for step in (0, 7):
        counts, _ = np.histogram(numbers[:, step], bins=20, range=(0, 1))
        assert chisquare(counts).pvalue > 1e-3
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 0.08, "neighbouring keys have nothing in common"


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.3, 0.6)])
def test_samples_follow_the_model_s_probabilities(
    tiny_llama: Callable[..., LoadedModel], temperature: float, top_p: float
) -> None:
    """4,000 keys against the softmax, cut by hand to the smallest set of likeliest tokens that reaches top_p."""
    model = _spread(tiny_llama(seed=4), 3.0)
    ids = _ids(model, ["who pays more ?"])[0]
    probabilities = (_logits(model, ids, [])[-1].double() / temperature).softmax(-1).numpy()
    order = np.argsort(-probabilities)
    before = np.cumsum(probabilities[order]) - probabilities[order]
    kept = order[before < top_p]
    expected = np.zeros_like(probabilities)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    generator = _generator(model, max_new_tokens=1, temperature=temperature, top_p=top_p, top_logprobs=1)
    drawn: Counter[int] = Counter()
    for start in range(0, 4000, 1000):
        keys = [f"{start + number:016x}" for number in range(1000)]
        run = generator.write_ids([ids] * 1000, keys)
        drawn.update(one.ids[0] if one.ids else -1 for one in run)
    ends = [model.tokenizer.pad_token_id, model.tokenizer.eos_token_id]
    likely = [token for token in kept if expected[token] * 4000 >= 5 and token not in ends]
    rest = 4000 - sum(drawn[token] for token in likely)
    share = 1 - sum(expected[token] for token in likely)
    observed, wanted = [drawn[t] for t in likely], [4000 * expected[t] for t in likely]
    if share * 4000 >= 5:
        observed, wanted = [*observed, rest], [*wanted, 4000 * share]
    scale = sum(observed) / sum(wanted)
    assert chisquare(observed, [value * scale for value in wanted]).pvalue > 1e-3
    assert set(drawn) - {-1} <= set(kept.tolist())
    assert len(likely) > 3


def test_a_sample_depends_on_its_key_alone(tiny_model: Callable[..., LoadedModel]) -> None:
    """Not on its batch, its place in it, the global state, or how often was drawn before."""
    model = tiny_model(seed=4)
    generator = _generator(model, temperature=1.0, max_new_tokens=10)
    ids = _ids(model, TEXTS * 3)
    first = generator.write_ids(ids, KEYS)
    torch.manual_seed(123)
    assert generator.write_ids(ids[::-1], KEYS[::-1]) == first[::-1]
    assert [generator.write_ids([one], [key])[0] for one, key in zip(ids, KEYS, strict=True)] == first
    same = generator.write_ids([ids[0]] * 12, KEYS)
    assert len({one.ids for one in same}) == 12, "samples of one text differ by their keys"


def test_a_low_top_p_is_greedy(tiny_llama: Callable[..., LoadedModel]) -> None:
    model = tiny_llama(seed=4)
    low = _generator(model, temperature=1.0, top_p=1e-6).write(TEXTS, KEYS[:4])
    assert low == _generator(model).write(TEXTS)


def test_continuous_batches_write_the_same_texts(tiny_llama: Callable[..., LoadedModel]) -> None:
    model = _spread(tiny_llama(seed=4), 2.0)
    generator = _generator(model, max_new_tokens=12)
    ids = _ids(model, PROMPTS * 3)
    found = dict(generator.write_continuously(enumerate(ids)))
    assert [found[number] for number in range(12)] == generator.write_ids(ids)
    assert model.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("names_flash", [True, False])
def test_float32_keeps_its_attention_in_continuous_batches(
    names_flash: bool, tiny_llama: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flash attention knows half precision only; older versions of transformers have no setting against it."""
    import transformers

    import distill_llm.models.continuous as continuous

    class Config:
        def __init__(self, **room: Any):
            if names_flash:
                self.auto_switch_to_flash = True

    asked: list[Any] = []
    model = tiny_llama().model

    def begin(generation_config: Any, continuous_batching_config: Any) -> None:
        flash = getattr(continuous_batching_config, "auto_switch_to_flash", None)
        asked.append((flash, model.config._attn_implementation))

    monkeypatch.setattr(transformers, "ContinuousBatchingConfig", Config)
    monkeypatch.setattr(model, "init_continuous_batching", begin)
    monkeypatch.setattr(
        model, "set_attn_implementation", lambda name: setattr(model.config, "_attn_implementation", name)
    )
    continuous._manager(model, [1], 0, 4)
    assert asked == ([(False, "sdpa")] if names_flash else [(None, "paged|sdpa")])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_gpu_writes_what_a_cpu_writes(family: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    """Greedy, drawn, and in continuous batches (decoder-only); drawn texts are those of their keys."""
    model = _spread(request.getfixturevalue(f"tiny_{family}")(seed=4), 2.0)
    ids = _ids(model, PROMPTS * 3)
    expected = _generator(model, max_new_tokens=12).write_ids(ids)
    drawn = _generator(model, max_new_tokens=12, temperature=1.0).write_ids(ids, KEYS)
    model.model.to("cuda", dtype)
    generator = _generator(model, max_new_tokens=12)
    found = generator.write_ids(ids)
    again = _generator(model, max_new_tokens=12, temperature=1.0).write_ids(ids, KEYS)
    if dtype == torch.float32:
        assert [one.ids for one in found] == [one.ids for one in expected]
        assert [one.ids for one in again] == [one.ids for one in drawn]
    if family == "llama":
        continuous = dict(generator.write_continuously(enumerate(ids)))
        written = [continuous[number] for number in range(len(ids))]
        same = sum(one == other for one, other in zip(written, found, strict=True))
        assert same >= (len(ids) if dtype == torch.float32 else len(ids) // 2), "words that tie may swap in bfloat16"


def test_the_models_mode_is_given_back_and_dropout_is_off(tiny_t5: Callable[..., LoadedModel]) -> None:
    """Validation runs in the middle of a training."""
    model = tiny_t5(seed=4, dropout_rate=0.5)
    model.model.train()
    first = _generator(model).write(TEXTS)
    assert model.model.training
    assert _generator(model).write(TEXTS) == first
    model.model.eval()
    assert _generator(model).write(TEXTS) == first
    assert not model.model.training


def test_the_attention_of_a_model_is_given_back(tiny_llama: Callable[..., LoadedModel]) -> None:
    """An error in the middle included: the next batch must not look for a prefix that is not there."""
    model = tiny_llama(seed=4)
    generator = _generator(model, temperature=1.0)
    ids = _ids(model, PROMPTS)
    generator.share_prefix(ids)
    with pytest.raises((IndexError, RuntimeError)):
        generator.write_ids(ids, KEYS[:2])
    assert model.model.config._attn_implementation == "sdpa"
    assert _generator(model).write(TEXTS) == _generator(tiny_llama(seed=4)).write(TEXTS)
