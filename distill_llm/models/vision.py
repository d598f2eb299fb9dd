"""Models that read a picture and write text: transformers' VisionEncoderDecoderModel, from the Hub or from a config;
and those that read a picture within a text, such as LLaVA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distill_llm.core.errors import ConfigError
from distill_llm.models.hub import from_hub

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from distill_llm.models.picture import Painter
    from distill_llm.models.spec import HubConfig, PictureSpec

MODEL_TYPE = "vision-encoder-decoder"
ENCODERS, DECODERS = ("vit",), ("bert", "gpt2", "trocr")
"""Model types of which a fresh model is made; others were not tried, and some decoders count positions by padding."""
MIXED = ("llava",)
"""Model types that read pictures within a text; others want more of a picture than its pixels."""


def is_vision(config: Any) -> bool:
    """Whether a model reads pictures, and writes what a text decoder does."""
    return config.model_type == MODEL_TYPE


def is_mixed(config: Any) -> bool:
    """Whether a model reads text, and pictures within it."""
    return config.model_type in MIXED


def head_words(config: Any) -> int:
    """Words that a model's head has logits for."""
    return config.decoder.vocab_size if is_vision(config) else config.get_text_config().vocab_size


def decoder_positions(config: Any) -> int | None:
    """Tokens that the decoder of a vision model has positions for."""
    return getattr(config.decoder, "max_position_embeddings", None)


def with_start_token(config: Any, generation: Any = None) -> Any:
    """``config`` with the token that the decoder starts with, wherever the checkpoint names it."""
    if is_vision(config) and getattr(config, "decoder_start_token_id", None) is None:
        places = (generation, config.decoder)
        named = [getattr(place, "decoder_start_token_id", None) for place in places]
        named += [getattr(place, "bos_token_id", None) for place in places]
        config.decoder_start_token_id = next((token for token in named if token is not None), None)
    return config


def fresh_sections(config: HubConfig, picture: PictureSpec, tokenizer: Any, where: str) -> dict[str, Any]:
    """``config`` with what follows from the tokenizer and from the pictures filled in, where it does not say itself.

    Raises ConfigError where a key is not known, or where its pictures are others than the recipe's.
    """
    of_decoder = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "is_decoder": True,
        "add_cross_attention": True,
    }
    return {
        **config,
        "encoder": _settled_encoder(config, picture, where),
        "decoder": of_decoder | _section(config, "decoder", where),
    }


def check_sections(config: HubConfig, picture: PictureSpec, where: str) -> None:
    """Raises ConfigError where encoder or decoder are missing, of a type that was not tried, have unknown keys, or are
    made for other pictures."""
    _settled_encoder(config, picture, where)
    _section(config, "decoder", where)


def _section(config: HubConfig, name: str, where: str) -> dict[str, Any]:
    from distill_llm.models.fresh import config_class

    section = config.get(name)
    known = ENCODERS if name == "encoder" else DECODERS
    if not isinstance(section, dict) or section.get("model_type") not in known:
        came = section.get("model_type") if isinstance(section, dict) else section
        raise ConfigError(
            f"{where}.{name}: expected a section with a `model_type`, one of {', '.join(known)}; it is {came!r}."
        )
    config_class(section, f"{where}.{name}")
    return section


def _settled_encoder(config: HubConfig, picture: PictureSpec, where: str) -> dict[str, Any]:
    encoder: dict[str, Any] = {"image_size": [picture.height, picture.width]} | _section(config, "encoder", where)
    size, patch = (_pair(encoder.get(name, usual)) for name, usual in (("image_size", 0), ("patch_size", 16)))
    if size != [picture.height, picture.width]:
        raise ConfigError(
            f"{where}.encoder.image_size: it is {size} (height, width), but `picture` makes {picture.height} x "
            f"{picture.width}. Remove image_size."
        )
    if any(pixels % step for pixels, step in zip(size, patch, strict=True)):
        raise ConfigError(
            f"{where}.encoder.patch_size: {patch} (height, width) does not divide the picture's height and width "
            f"{size}: its edge would not be seen. Change one of them."
        )
    return encoder | {"patch_size": patch}


def _pair(value: Any) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [value, value]


def rest_unused(model: Any) -> None:
    """Weights that no logit comes from do not learn: several processes would wait for their gradient for ever."""
    pooler = getattr(model.get_encoder(), "pooler", None)
    if pooler is not None:
        pooler.requires_grad_(False)


def settled(model: Any, where: str) -> Any:
    """A model; one that sees, with what training and generation need to know of it."""
    if is_vision(model.config):
        rest_unused(model)
        if with_start_token(model.config, model.generation_config).decoder_start_token_id is None:
            raise ConfigError(f"{where}: its config names no decoder_start_token_id. Add it to config.json.")
    return model


def picture_shape(config: Any) -> tuple[int, int, int]:
    """Channels, rows and columns of the pixels that a vision model is made for."""
    height, width = _pair(config.encoder.image_size)
    return getattr(config.encoder, "num_channels", 3), height, width


def blank_picture(model: Any) -> Float[Tensor, "1 C H W"]:
    """Pixels of that size."""
    import torch

    weight = next(model.parameters())
    return torch.zeros(1, *picture_shape(model.config), device=weight.device, dtype=weight.dtype)


def fresh_painter(spec: PictureSpec, config: Any, *, where: str) -> Painter:
    """For a model that is made for these very pictures."""
    from transformers import ViTImageProcessorPil

    channels = config.encoder.num_channels
    middle = [0.5] * channels
    size = {"height": spec.height, "width": spec.width}
    processor = ViTImageProcessorPil(size=size, image_mean=middle, image_std=middle)
    return _counted(spec, processor, config, where)


def read_painter(spec: PictureSpec, source: str, revision: str, config: Any, *, where: str) -> Painter:
    """With the image processor of a model from the Hub or a folder; no weights are loaded."""
    from transformers import AutoImageProcessor

    if is_mixed(config) and spec.source == "text":
        raise ConfigError(
            f"{where}.picture.source: the model ({config.model_type}) reads the text anyway, and a picture of it says "
            "nothing new. Set source: data, for images of the examples' own (`task.fields.picture`)."
        )
    # Pillow's own arithmetic, so that machines with and without torchvision see the same.
    options = {"where": where, "what": "image processor", "backend": "pil"}
    processor = from_hub(AutoImageProcessor.from_pretrained, source, revision, **options)
    return _counted(spec, processor, config, where)


def _counted(spec: PictureSpec, processor: Any, config: Any, where: str) -> Painter:
    """Its pictures pass through the model's encoder once, as shapes without numbers: that they fit, and how long
    what comes out is."""
    from distill_llm.models.picture import Painter

    sees = config.vision_config if is_mixed(config) else config.encoder
    painter = Painter(spec, processor, channels=getattr(sees, "num_channels", 3), where=f"{where}.picture")
    try:
        painter.num_tokens = _states_of(config, painter.shape)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{where}: its encoder does not take pictures of {painter.shape} (channels, height, width), as its image "
            f"processor makes them: {str(error).strip().splitlines()[0]}"
        ) from None
    painter.place_id = config.image_token_id if is_mixed(config) else None
    return painter


def _states_of(config: Any, shape: tuple[int, int, int]) -> int:
    """How many a model makes of one picture."""
    import torch
    from transformers import AutoModel

    with torch.device("meta"), torch.no_grad():
        picture = torch.empty(1, *shape)
        if is_mixed(config):
            model: Any = AutoModel.from_config(config).eval()
            return sum(len(states) for states in model.get_image_features(pixel_values=picture).pooler_output)
        return AutoModel.from_config(config.encoder).eval()(pixel_values=picture).last_hidden_state.size(1)
