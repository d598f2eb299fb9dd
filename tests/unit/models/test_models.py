"""Models and tokenizers: fresh ones, saved ones, adapters, and errors that come before a download."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from distill_llm.core.errors import ConfigError
from distill_llm.models.folder import weight_bytes
from distill_llm.models.load import (
    LoadedModel,
    build_student,
    count_parameters,
    load_model,
    load_tokenizer,
    read_tokenizer,
    revision_of,
)
from distill_llm.models.lora import add_lora
from distill_llm.models.spec import FreshTokenizer, LoraSpec, StudentSpec
from distill_llm.models.tokenizer import train_tokenizer
from distill_llm.teachers.base import Sampling
from distill_llm.teachers.frozen import Frozen
from distill_llm.teachers.student import StudentFacts
from distill_llm.teachers.transformers import Transformers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WORDS = FreshTokenizer(kind="words", vocab_size=64)
T5: dict[str, Any] = {"model_type": "t5", "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}


def _save(model: LoadedModel, folder: Path) -> str:
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return str(folder)


def _logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[5, 6, 7, 8]])
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **more).logits


def _fresh(config: dict[str, Any], where: str = "student") -> LoadedModel:
    spec = StudentSpec(config=config, tokenizer=WORDS)
    return build_student(spec, load_tokenizer(spec, ["a b c"]), where=where)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            T5 | {"num_layer": 2},
            r"student\.config\.num_layer: T5Config has no such setting\. Did you mean 'num_layers'",
        ),
        ({"model_type": "lama"}, r"student\.config\.model_type: 'lama' .* Did you mean 'llama'"),
        (T5 | {"hidden_sizes": 4}, r"Did you mean 'hidden_size'"),
        ({"model_type": "llama", "zzzzqq": 1}, r"zzzzqq: LlamaConfig has no such setting\.$"),
        (T5 | {"feed_forward_proj": "a-b-c"}, r"student\.config: T5Config refuses these settings"),
    ],
)
def test_a_wrong_config_names_the_nearest_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _fresh(config)


def test_a_fresh_model_takes_its_vocabulary_and_special_tokens_from_the_tokenizer(
    tiny_model: Callable[..., LoadedModel],
) -> None:
    model = tiny_model(text="a b c d")
    config, tokenizer = model.model.config, model.tokenizer
    assert config.vocab_size == len(tokenizer) == 7
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    if model.is_encoder_decoder:
        assert config.decoder_start_token_id == 0
    assert model.num_parameters == sum(weight.numel() for weight in model.model.parameters()) > 1000


def test_the_config_may_ask_for_a_larger_head() -> None:
    assert _fresh(T5 | {"vocab_size": 100}).model.get_output_embeddings().weight.shape[0] == 100


def test_a_fresh_t5s_relative_bias_is_spread() -> None:
    """N(0, 1) in encoder and decoder; transformers' own start is d_model^-0.5 = 0.25 wide."""
    torch.manual_seed(0)
    biases = [w for name, w in _fresh(T5 | {"num_heads": 16}).model.named_parameters() if "relative_attention" in name]
    assert len(biases) == 2
    for bias in biases:
        assert bias.numel() == 32 * 16
        assert abs(bias.std().item() - 1) < 0.15
        assert abs(bias.mean().item()) < 0.15


def test_words_tokenizer() -> None:
    tokenizer = train_tokenizer(WORDS, ["who pays more ? ann !", "ann pays"])
    ids = tokenizer("ann pays zebra ?")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["ann", "pays", "<unk>", "?"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ann pays ?"
    assert tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<unk>"]) == [0, 1, 2]


def test_bytes_tokenizer_writes_any_text_and_merges_the_frequent() -> None:
    tokenizer = train_tokenizer(FreshTokenizer(vocab_size=300), ["tomorrow tomorrow tomorrow"] * 4)
    for text in ("never seen: zebra, é, 漢字\n\ttab  two", "tomorrow"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids).removeprefix(" ") == text
    assert len(tokenizer("tomorrow")["input_ids"]) == 1
    assert len(tokenizer) <= 300


@pytest.mark.parametrize("kind", ["words", "bytes_bpe"])
def test_a_saved_tokenizer_comes_back_the_same(tmp_path: Path, kind: Any) -> None:
    """Trials read it from the run folder: other ids there would be another task."""
    before = train_tokenizer(FreshTokenizer(kind=kind, vocab_size=300), ["who pays more ? ann pays 12"])
    before.save_pretrained(tmp_path)
    after = read_tokenizer(str(tmp_path), where="student.tokenizer")
    text = "who pays 12 ? zebra"
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.get_vocab() == before.get_vocab()
    assert (after.pad_token_id, after.eos_token_id) == (before.pad_token_id, before.eos_token_id)
    assert after.decode(after(text)["input_ids"]) == before.decode(before(text)["input_ids"])


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(WORDS, ["a b"])
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert read_tokenizer(str(tmp_path), where="x").pad_token == "</s>"


def test_a_saved_model_comes_back_the_same(tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    before = tiny_model(seed=3)
    folder = _save(before, tmp_path / "model")
    after = build_student(StudentSpec(model=folder), read_tokenizer(folder, where="x"))
    assert after.is_encoder_decoder == before.is_encoder_decoder
    torch.testing.assert_close(_logits(after.model), _logits(before.model), atol=0, rtol=0)
    assert count_parameters(folder, where="x") == before.num_parameters
    assert weight_bytes(folder) == (tmp_path / "model" / "model.safetensors").stat().st_size
    assert weight_bytes(str(tmp_path / "none")) is None


def test_a_folders_revision_is_its_weights(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """So that a teacher that was trained anew is another teacher, and its completions are asked for again."""
    first, second = _save(tiny_t5(seed=1), tmp_path / "a"), _save(tiny_t5(seed=2), tmp_path / "b")
    copy = _save(tiny_t5(seed=1), tmp_path / "c")
    names = [revision_of(folder, where="x") for folder in (first, second, copy)]
    assert names[0] != names[1]
    assert names[0] == names[2] != "main"


def test_a_tokenizer_with_more_words_than_the_head_is_refused(
    tiny_t5: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    folder = _save(tiny_t5(text="a b"), tmp_path)
    with pytest.raises(ConfigError, match=r"student\.tokenizer: it has 8 entries, but the model's head has 5"):
        build_student(StudentSpec(model=folder), tiny_t5(text="a b c d e").tokenizer)


@pytest.mark.parametrize("missing", ["./no/such/folder", "/no/such/folder", "runs/deep/er/model"])
def test_a_missing_folder_is_a_config_error(missing: str) -> None:
    with pytest.raises(ConfigError, match=r"student\.model: there is no folder"):
        load_model(missing, where="student.model")
    with pytest.raises(ConfigError, match="there is no folder"):
        read_tokenizer(missing, where="student.tokenizer")


def test_an_unknown_hub_id_without_a_network_fails_soon() -> None:
    start = time.monotonic()
    for load in (read_tokenizer, load_model, count_parameters):
        with pytest.raises(ConfigError, match=r"student\.model: cannot load .* 'nobody/no-such-model' \(revision v1\)"):
            load("nobody/no-such-model", "v1", where="student.model")
    assert time.monotonic() - start < 10


def test_a_folder_without_a_model_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"teachers\.big: cannot load the config"):
        load_model(str(tmp_path), where="teachers.big")


def _with_adapter(model: LoadedModel, base: str, **options: Any) -> Any:
    """The student of a LoRA recipe, with adapters that do something."""
    spec = StudentSpec(model=base, lora=LoraSpec(rank=2, alpha=4), **options)
    student = build_student(spec, model.tokenizer).model
    torch.manual_seed(9)
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    return student


def test_lora_starts_as_its_base_and_trains_the_adapters_alone(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    before = tiny_model(seed=3)
    student = add_lora(load_model(_save(before, tmp_path / "base"), where="x"), LoraSpec(rank=2))
    torch.testing.assert_close(_logits(student), _logits(before.model))
    trained = {name for name, weight in student.named_parameters() if weight.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)


def test_lora_saved_and_loaded_back_says_the_same(tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    before = tiny_model(seed=3)
    student = _with_adapter(before, _save(before, tmp_path / "base"))
    expected = _logits(student)
    assert (expected - _logits(before.model)).abs().max() > 0.1, "adapters that do nothing would prove nothing"
    folder = _save(LoadedModel(student, before.tokenizer), tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*.safetensors")), "the adapter alone is saved"
    loaded = load_model(folder, where="x")
    torch.testing.assert_close(_logits(loaded), expected, atol=1e-5, rtol=1e-5)
    assert sum(weight.numel() for weight in loaded.parameters()) == before.num_parameters
    again = build_student(StudentSpec(model=folder, lora=LoraSpec(rank=2)), before.tokenizer)
    torch.testing.assert_close(_logits(again.model), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_folder_has_the_size_and_the_precision_of_its_model(
    tiny_t5: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    """A LoRA student may be another recipe's teacher: its size is asked for before its weights are read."""
    before = tiny_t5(seed=3)
    student = _with_adapter(before, _save(before, tmp_path / "base"))
    folder = _save(LoadedModel(student, before.tokenizer), tmp_path / "adapter")
    assert count_parameters(folder, where="teachers.big") == before.num_parameters
    assert load_model(folder, where="x", dtype="bfloat16").dtype == torch.bfloat16


def test_an_adapter_folder_can_teach(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """Its config is its base's: both kinds of teacher find it, before and when they are opened."""
    before = tiny_t5(seed=3)
    student = _with_adapter(before, _save(before, tmp_path / "base"))
    folder = _save(LoadedModel(student, before.tokenizer), tmp_path / "adapter")
    Transformers(model=folder).check(chat=False, sampling=Sampling())
    frozen = Frozen(model=folder)
    frozen.check()
    facts = StudentFacts(before.tokenizer.get_vocab(), True, "cpu")
    assert frozen.open(facts) is not None


def test_an_adapter_remembers_the_revision_of_its_base(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """Otherwise it would be merged into whatever the Hub's main branch is by then."""
    before = tiny_t5(seed=3)
    student = _with_adapter(before, _save(before, tmp_path / "base"), revision="v1.0")
    student.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["revision"] == "v1.0"


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"model": "a/b", "config": T5},
        {"config": {"d_model": 4}, "tokenizer": "a/b"},
        {"config": T5},
        {"config": T5, "tokenizer": "a/b", "lora": {}},
    ],
)
def test_students_that_make_no_sense_are_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"give either|model_type|random weights|needs a `tokenizer`"):
        StudentSpec.model_validate(spec)
