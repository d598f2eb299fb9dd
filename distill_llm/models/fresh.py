"""Fresh models: of the class, the sizes and the vocabulary that a config and a tokenizer ask for."""

from __future__ import annotations

import difflib
import inspect
from typing import TYPE_CHECKING, Any

from distill_llm.core.errors import ConfigError
from distill_llm.models.vision import MODEL_TYPE, fresh_sections, is_mixed, is_vision, settled

if TYPE_CHECKING:
    from distill_llm.models.spec import HubConfig, StudentSpec


def auto_class(config: Any) -> Any:
    """The family of models with a language head that a config belongs to."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    if is_vision(config) or is_mixed(config):
        return AutoModelForImageTextToText
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def fresh_model(spec: StudentSpec, tokenizer: Any, where: str) -> Any:
    """A model with random weights. The vocabulary's size and special tokens come from the tokenizer."""
    config = spec.config
    if spec.picture is not None:
        config = fresh_sections(config, spec.picture, tokenizer, where)
    return settled(drawn(_fresh_config(config, tokenizer, where)), where)


def drawn(config: Any) -> Any:
    """A model of a Hugging Face config, with random weights."""
    model = auto_class(config).from_config(config)
    if config.model_type == "t5":
        _spread_relative_bias(model)
    return model


def weightless(config: Any) -> Any:
    """A model of a Hugging Face config whose weights have shapes and no numbers."""
    import torch

    with torch.device("meta"):
        return auto_class(config).from_config(config)


def config_class(config: HubConfig, where: str) -> Any:
    """The config class of ``config``'s model type, all of whose keys it knows."""
    from transformers import CONFIG_MAPPING

    model_type = str(config["model_type"])
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING.keys()), n=1)
        raise ConfigError(
            f"{where}.model_type: '{model_type}' is not a model type of transformers."
            + (f" Did you mean '{near[0]}'?" if near else "")
        )
    config_class = CONFIG_MAPPING[model_type]
    known = ["model_type", *inspect.signature(config_class).parameters, *config_class.attribute_map]
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(
                f"{where}.{key}: {config_class.__name__} has no such setting."
                + (f" Did you mean '{near[0]}'?" if near else "")
            )
    return config_class


def _fresh_config(config: HubConfig, tokenizer: Any, where: str) -> Any:
    from huggingface_hub.errors import StrictDataclassError

    made_by = config_class(config, where)
    sizes = {key: value for key, value in config.items() if key != "model_type"}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if config["model_type"] != MODEL_TYPE:  # whose words are its decoder's
        special |= {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}
    if getattr(made_by(), "is_encoder_decoder", False):
        special["decoder_start_token_id"] = tokenizer.pad_token_id
    try:
        return made_by(**(special | sizes))
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ConfigError(f"{where}: {made_by.__name__} refuses these settings: {error}") from None


def _spread_relative_bias(model: Any) -> None:
    """Draws T5's relative attention bias from N(0, 1).

    From its own, smaller start it moves too slowly, and small T5s learn or fail by their seed (docs/log.md).
    """
    import torch

    for name, weight in model.named_parameters():
        if "relative_attention_bias" in name:
            torch.nn.init.normal_(weight)
