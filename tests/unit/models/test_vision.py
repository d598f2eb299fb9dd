"""Models that read pictures: fresh ones, saved and loaded ones, what they write, and settings that are refused."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import ValidationError

from distill_llm.core.errors import ConfigError
from distill_llm.models.generate import Generator
from distill_llm.models.layers import shapes_of
from distill_llm.models.load import build_student, check_student, count_parameters, load_model, read_tokenizer
from distill_llm.models.spec import StudentSpec
from distill_llm.models.vision import head_words, read_painter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from distill_llm.models.load import LoadedModel
    from distill_llm.models.picture import Painter

pytest.importorskip("PIL", reason="needs the extra pictures")

TEXTS = ["ann and bob", "who pays more ?", "c"]
every_decoder = pytest.mark.parametrize("decoder", ["bert", "gpt2", "trocr"])


def _painter(model: LoadedModel) -> Painter:
    assert model.painter is not None
    return model.painter


def _pixels(model: LoadedModel, texts: list[str] = TEXTS) -> torch.Tensor:
    painter = _painter(model)
    return painter.pixels([painter.picture(text) for text in texts])


def _spec(**changes: Any) -> StudentSpec:
    config: dict[str, Any] = {
        "model_type": "vision-encoder-decoder",
        "encoder": {"model_type": "vit", "patch_size": 11},
        "decoder": {"model_type": "gpt2"},
    }
    keys = {"config": config, "picture": {"width": 99, "height": 33, "font": "fixed"}, "tokenizer": {"kind": "words"}}
    return StudentSpec.model_validate(keys | changes)


def _config(**changes: Any) -> dict[str, Any]:
    return {**_spec().config, **changes}


@every_decoder
def test_it_is_made_for_its_pictures_and_its_words(decoder: str, tiny_vision: Callable[..., LoadedModel]) -> None:
    model = tiny_vision(decoder=decoder)
    config = model.model.config
    assert model.is_encoder_decoder
    assert config.encoder.image_size == [33, 96]
    assert head_words(config) == len(model.tokenizer) == model.model.get_output_embeddings().weight.size(0)
    assert config.decoder_start_token_id == model.tokenizer.pad_token_id
    with torch.no_grad():
        logits = model.model(pixel_values=_pixels(model), decoder_input_ids=torch.tensor([[0]]).expand(3, -1)).logits
    assert (logits[0] - logits[1]).abs().max() > 1e-5, "the picture makes a difference"
    states = model.model.encoder(pixel_values=_pixels(model)).last_hidden_state
    assert states.shape[:2] == (3, _painter(model).num_tokens) == (3, 1 + 3 * 8)
    assert shapes_of(model.model)["decoder"].layers == 1
    still = [name for name, weight in model.model.named_parameters() if not weight.requires_grad]
    assert still
    assert all(".pooler." in name for name in still), "of these no logit comes, and DDP would wait for them"


@every_decoder
def test_it_writes_what_its_logits_say(decoder: str, tiny_vision: Callable[..., LoadedModel]) -> None:
    """Greedy, token by token and without a cache, each picture alone; behind a prefix."""
    model = tiny_vision(decoder=decoder, seed=3)
    prefix = model.tokenizer("predict :", add_special_tokens=False)["input_ids"]
    written = Generator(model.model, model.tokenizer, max_new_tokens=5, decoder_prefix=prefix).write_pictures(
        _pixels(model)
    )
    for text, got in zip(TEXTS, written, strict=True):
        ids = [model.model.config.decoder_start_token_id, *prefix]
        with torch.no_grad():
            for _ in range(5):
                logits = model.model(
                    pixel_values=_pixels(model, [text]), decoder_input_ids=torch.tensor([ids]), use_cache=False
                ).logits
                ids.append(int(logits[0, -1].argmax()))
        wanted = ids[1 + len(prefix) :]
        end = next((place for place, token in enumerate(wanted) if token in (0, 1)), 5)
        assert list(got.ids) == wanted[:end]


def test_saved_and_loaded_it_says_the_same(tiny_vision: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """By our loading, as a student of another recipe, and by plain transformers."""
    from transformers import AutoImageProcessor, AutoModelForImageTextToText

    model = tiny_vision(seed=4)
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    _painter(model).save(str(tmp_path))
    ids = torch.tensor([[0, 5, 6]]).expand(3, -1)
    wanted = model.model(pixel_values=_pixels(model), decoder_input_ids=ids).logits
    spec = StudentSpec.model_validate({"model": str(tmp_path), "picture": _painter(model).spec.model_dump()})
    check_student(spec)
    again = build_student(spec, read_tokenizer(str(tmp_path), where="here"))
    assert torch.equal(again.model.eval()(pixel_values=_pixels(again), decoder_input_ids=ids).logits, wanted)
    assert count_parameters(str(tmp_path), where="here") == model.num_parameters
    ours = load_model(str(tmp_path), where="here")
    painter = read_painter(_painter(model).spec, str(tmp_path), "main", ours.config, where="here")
    plain = AutoModelForImageTextToText.from_pretrained(str(tmp_path)).eval()
    images = [painter.paint(painter.picture(text)) for text in TEXTS]
    pixels = AutoImageProcessor.from_pretrained(str(tmp_path), backend="pil")(images, return_tensors="pt")
    assert torch.equal(plain(**pixels, decoder_input_ids=ids).logits, wanted)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (_config(encoder={"model_type": "swin"}), "encoder: expected a section with a `model_type`, one of vit"),
        (_config(decoder={"model_type": "roberta"}), "decoder: expected a section .* one of bert, gpt2, trocr; it is"),
        (_config(decoder={"model_type": "gpt2", "n_lair": 1}), "decoder.n_lair: GPT2Config has no such setting"),
        (_config(decoder="gpt2"), "decoder: expected a section"),
        (_config(size=3), "config.size: VisionEncoderDecoderConfig has no such setting"),
    ],
)
def test_a_section_that_will_not_do_is_refused_before_anything_is_made(config: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        check_student(_spec(config=config))


@pytest.mark.parametrize(
    ("encoder", "complaint"),
    [
        ({"patch_size": 16}, r"patch_size: \[16, 16\] \(height, width\) does not divide .* \[33, 99\]"),
        ({"patch_size": 11, "image_size": 99}, r"image_size: it is \[99, 99\] .* `picture` makes 33 x 99. Remove"),
    ],
)
def test_patches_that_do_not_fit_are_refused(encoder: dict[str, Any], complaint: str) -> None:
    config = _config(encoder={"model_type": "vit", **encoder})
    with pytest.raises(ConfigError, match=complaint):
        check_student(_spec(config=config))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"picture": None}, "a fresh model reads pictures if it is a vision-encoder-decoder.*: add `picture`"),
        ({"config": {"model_type": "t5"}}, "remove `picture`, or change config.model_type"),
        ({"chat": True}, "`lora` and `chat` are for students that read text"),
        ({"config": {}, "model": "a/b", "lora": {}}, "`lora` and `chat` are for students that read text"),
        ({"picture": {"source": "data"}}, "set prefix_side: decoder"),
        ({"picture": {"width": 0}}, "greater than 0"),
    ],
)
def test_a_student_that_cannot_be_is_refused_as_the_recipe_loads(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=re.compile(complaint, re.DOTALL)):
        _spec(**changes)


def test_a_saved_model_says_itself_what_it_reads(
    tiny_vision: Callable[..., LoadedModel], tiny_t5: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    for name, build in (("sees", tiny_vision), ("reads", tiny_t5)):
        build().model.save_pretrained(tmp_path / name)
    with pytest.raises(ConfigError, match=r"reads pictures: add `student\.picture`"):
        check_student(StudentSpec(model=str(tmp_path / "sees")))
    with pytest.raises(ConfigError, match=r"\(t5\) reads text: remove `student\.picture`"):
        check_student(StudentSpec.model_validate({"model": str(tmp_path / "reads"), "picture": {}}))
