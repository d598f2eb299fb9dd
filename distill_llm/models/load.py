"""Models and tokenizers from the Hub, from a folder, or fresh from a config."""

from __future__ import annotations

import difflib
import functools
import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from distill_llm.core.errors import ConfigError
from distill_llm.core.extras import need
from distill_llm.core.files import file_fingerprint
from distill_llm.core.hub import PROBE_SECONDS, why_unreachable
from distill_llm.models.vision import (
    MODEL_TYPE,
    check_sections,
    fresh_painter,
    fresh_sections,
    head_words,
    is_vision,
    read_painter,
    rest_unused,
    with_start_token,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from distill_llm.models.picture import Painter
    from distill_llm.models.spec import HubConfig, StudentSpec

Bits: TypeAlias = Literal["full", "8bit", "4bit"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with the tokenizer that goes with it."""

    model: Any
    tokenizer: Any
    painter: Painter | None = None
    """Makes the pictures that it reads in place of text."""

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    @property
    def num_parameters(self) -> int:
        return sum(weight.numel() for weight in self.model.parameters())


def build_student(spec: StudentSpec, tokenizer: Any, *, where: str = "student") -> LoadedModel:
    """The student before training, for a tokenizer that ``load_tokenizer`` gave."""
    if spec.config:
        model = _fresh_model(spec, tokenizer, f"{where}.config")
        _set_attention(model, spec, where)
        painter = fresh_painter(spec.picture, model.config, where=where) if spec.picture else None
        return LoadedModel(model, tokenizer, painter)
    model = load_model(spec.model, spec.revision, where=f"{where}.model")
    if len(tokenizer) > head_words(model.config):
        raise ConfigError(
            f"{where}.tokenizer: it has {len(tokenizer)} entries, but the model's head has "
            f"{head_words(model.config)}. Remove `tokenizer` to use the model's own."
        )
    _set_attention(model, spec, where)
    if spec.lora is not None:
        from distill_llm.models.lora import add_lora

        model = add_lora(model, spec.lora, spec.revision)
    if spec.picture is None:
        return LoadedModel(model, tokenizer)
    return LoadedModel(
        model, tokenizer, read_painter(spec.picture, spec.model, spec.revision, model.config, where=where)
    )


def _set_attention(model: Any, spec: StudentSpec, where: str) -> None:
    if spec.attention == "auto":
        return
    try:
        model.set_attn_implementation(spec.attention)
    except (ImportError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"{where}.attention: {type(model).__name__} cannot have '{spec.attention}' here: {reason} Remove "
            "`attention`, or install what it needs."
        ) from None


def check_student(spec: StudentSpec, *, where: str = "student") -> None:
    """Raises ConfigError where the student's model or tokenizer cannot be had. Loads no weights."""
    if spec.picture is not None:
        from distill_llm.models.picture import check_pillow

        check_pillow(f"{where}.picture")
    if spec.config:
        is_encoder_decoder = bool(getattr(config_class(spec.config, f"{where}.config")(), "is_encoder_decoder", False))
        if spec.picture is not None:
            check_sections(spec.config, spec.picture, f"{where}.config")
    else:
        config = read_config(spec.model, spec.revision, where=f"{where}.model")
        is_encoder_decoder = bool(config.is_encoder_decoder)
        if is_vision(config) != (spec.picture is not None):
            reads, do = ("pictures", "add") if is_vision(config) else ("text", "remove")
            raise ConfigError(
                f"{where}.model: '{spec.model}' ({config.model_type}) reads {reads}: {do} `{where}.picture`. Pictures "
                f"are read by models of the type {MODEL_TYPE}."
            )
    if spec.prefix_side == "decoder" and not is_encoder_decoder:
        raise ConfigError(
            f"{where}.prefix_side: 'decoder' needs an encoder-decoder, and this student is decoder-only: it has one "
            "side. Remove `prefix_side`."
        )
    if isinstance(spec.tokenizer, str):
        load_tokenizer(spec, (), where=where)


def load_tokenizer(spec: StudentSpec, training_text: Iterable[str], *, where: str = "student") -> Any:
    """The student's tokenizer, with a padding token. ``training_text`` feeds a fresh one, and is not read otherwise."""
    if not isinstance(spec.tokenizer, str):
        from distill_llm.models.tokenizer import train_tokenizer

        return train_tokenizer(spec.tokenizer, training_text)
    if spec.tokenizer:
        return read_tokenizer(spec.tokenizer, where=f"{where}.tokenizer")
    return read_tokenizer(spec.model, spec.revision, where=f"{where}.model")


def read_tokenizer(source: str, revision: str = "main", *, where: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = from_hub(AutoTokenizer.from_pretrained, source, revision, where=where, what="tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_config(source: str, revision: str = "main", *, where: str) -> Any:
    """The config of a model; that of an adapter is its base's, which it is merged into."""
    from transformers import AutoConfig

    if is_adapter(source):
        from distill_llm.models.lora import base_of

        return read_config(*base_of(source), where=f"{where} (base of the adapter)")
    return with_start_token(from_hub(AutoConfig.from_pretrained, source, revision, where=where, what="config"))


def load_model(source: str, revision: str = "main", *, where: str, dtype: str = "float32") -> Any:
    """A model with a language head, of the family that its config names; an adapter folder loads with its base."""
    if is_adapter(source):
        from distill_llm.models.lora import load_with_adapter

        return load_with_adapter(source, where=where, dtype=dtype)
    config = read_config(source, revision, where=where)
    model_class = _auto_class(config)
    model = from_hub(model_class.from_pretrained, source, revision, where=where, what="weights", dtype=dtype)
    return _settled(model, where)


def load_on(device: str, source: str, revision: str, *, where: str, dtype: str, load_in: Bits = "full") -> Any:
    """A model for inference, on a device that ``choose_device`` gave; ``load_in``: fewer bits a weight."""
    if load_in == "full":
        return load_model(source, revision, where=where, dtype=dtype).to(device)
    from transformers import BitsAndBytesConfig

    check_bits(source, load_in, where=where)
    if dtype == "auto":  # of what is not quantized; each is the one that its kernels compute in
        dtype = "float16" if load_in == "8bit" else "bfloat16"
    if load_in == "8bit":
        bits = BitsAndBytesConfig(load_in_8bit=True)
    else:
        bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model_class = _auto_class(read_config(source, revision, where=where))
    options = {"quantization_config": bits, "device_map": {"": device}, "dtype": dtype}
    return _settled(
        from_hub(model_class.from_pretrained, source, revision, where=where, what="weights", **options), where
    )


def check_bits(source: str, load_in: Bits, *, where: str) -> None:
    """Raises ConfigError where the weights of ``source`` cannot be loaded in so few bits."""
    if load_in == "full":
        return
    need("bitsandbytes", "quantize", where=f"{where} (load_in: {load_in})")
    if is_adapter(source):
        raise ConfigError(
            f"{where}: '{source}' is a folder with an adapter, which has to be merged into full weights. Set "
            "`load_in: full`, or merge the adapter and save the whole model first."
        )


def choose_device(asked: str, *, where: str) -> str:
    """The device that ``asked`` names; of `auto`, this process's own GPU, or the CPU where there is none."""
    import torch

    known = ("auto", "cpu", "mps", "cuda")
    kind, _, number = asked.partition(":")
    if kind not in known or (number and (kind != "cuda" or not number.isdecimal())) or asked.endswith(":"):
        raise ConfigError(f"{where}: '{asked}' is no device. Expected auto, cpu, cuda, cuda:NUMBER or mps.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "auto":
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % count}" if count else "cpu"
    if (kind == "cuda" and int(number or 0) >= count) or (kind == "mps" and not torch.backends.mps.is_available()):
        raise ConfigError(
            f"{where}: '{asked}' is not here: torch {torch.__version__} sees {count} CUDA devices and "
            f"{'an' if torch.backends.mps.is_available() else 'no'} MPS device. Use `auto`, or install a torch that "
            "fits the machine."
        )
    return asked


def context_tokens(config: Any) -> int | None:
    """The longest input that a model has positions for; None where its positions are relative.

    Of a decoder-only model this is input and output together, of an encoder-decoder the input alone.
    """
    text = config.get_text_config()
    if hasattr(text, "relative_attention_num_buckets"):  # T5: its n_positions only says how it was trained
        return None
    for name in ("max_encoder_position_embeddings", "max_position_embeddings"):
        found = getattr(text, name, None)
        if isinstance(found, int) and found > 0:
            return found
    return None


def revision_of(source: str, asked: str = "main", *, where: str) -> str:
    """The commit of a Hub model, or a fingerprint of a folder's weights; no weights are loaded."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return "-".join(file_fingerprint(path) for path in sorted(folder.glob("*.safetensors"))) or asked
    return str(getattr(read_config(source, asked, where=where), "_commit_hash", None) or asked)


def weights_of(source: str, revision: str = "main", *, where: str) -> str:
    """The name of weights for keys: ``id@commit``, or a folder's fingerprint alone, for a folder may be moved."""
    found = revision_of(source, revision, where=where)
    is_fingerprint = Path(source).expanduser().is_dir() and found != revision
    return f"folder@{found}" if is_fingerprint else f"{source}@{found}"


def count_parameters(source: str, revision: str = "main", *, where: str) -> int:
    """Parameters of a model, from its config alone."""
    import torch

    config = read_config(source, revision, where=where)
    with torch.device("meta"):
        model = _auto_class(config).from_config(config)
    return sum(weight.numel() for weight in model.parameters())


def weight_bytes(folder: str) -> int | None:
    """Size on disk of a folder's weights, those of an adapter's base included; None where one of them is not here."""
    own = sum(path.stat().st_size for path in Path(folder).expanduser().glob("*.safetensors"))
    if not own or not is_adapter(folder):
        return own or None
    from distill_llm.models.lora import base_of

    base = weight_bytes(base_of(folder)[0])
    return own + base if base else None


def is_adapter(source: str) -> bool:
    """Whether a folder holds an adapter, which needs its base."""
    return (Path(source).expanduser() / "adapter_config.json").is_file()


def _settled(model: Any, where: str) -> Any:
    """A vision model with what training and generation need to know of it."""
    if is_vision(model.config):
        rest_unused(model)
        if with_start_token(model.config, model.generation_config).decoder_start_token_id is None:
            raise ConfigError(f"{where}: its config names no decoder_start_token_id. Add it to config.json.")
    return model


def _auto_class(config: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    if is_vision(config):
        return AutoModelForImageTextToText
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def from_hub(load: Any, source: str, revision: str, *, where: str, what: str, **options: Any) -> Any:
    if _looks_like_path(source) and not Path(source).expanduser().is_dir():
        raise ConfigError(
            f"{where}: there is no folder '{source}'. Expected a Hub id such as google/t5-v1_1-base or an existing "
            "folder with a Hugging Face model; if another recipe makes it, run that one first."
        )
    is_local = _looks_like_path(source)
    trouble = None if is_local else _why_unreachable(source)
    if trouble:
        options["local_files_only"] = True
    try:
        return load(str(Path(source).expanduser()) if is_local else source, revision=revision, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        if trouble:
            reason = f"the Hub cannot be reached ({trouble}) and no copy is in the cache."
        raise ConfigError(
            f"{where}: cannot load the {what} of '{source}' (revision {revision}): {reason} Check the spelling of the "
            "Hub id, the network, and `hf auth login` for a gated model, or give a local folder."
        ) from None


@functools.cache
def _why_unreachable(model: str) -> str | None:
    """Why the Hub says nothing of this model; an answer, even a bad one, is left to loading to explain."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return why_unreachable(lambda: HfApi().model_info(model, timeout=PROBE_SECONDS))
    except HfHubHTTPError:
        return None


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).is_dir()


def _fresh_model(spec: StudentSpec, tokenizer: Any, where: str) -> Any:
    """A model with random weights. The vocabulary's size and special tokens come from the tokenizer."""
    config = spec.config
    if spec.picture is not None:
        config = fresh_sections(config, spec.picture, tokenizer, where)
    hf_config = _fresh_config(config, tokenizer, where)
    model = _settled(_auto_class(hf_config).from_config(hf_config), where)
    if hf_config.model_type == "t5":
        _spread_relative_bias(model)
    return model


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
