"""Models and tokenizers from the Hub, from a folder, or fresh from a config."""

from __future__ import annotations

import os
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_llm.core.errors import ConfigError
from distill_llm.core.extras import need
from distill_llm.core.files import file_fingerprint
from distill_llm.models.bits import bits_config, count_in_bits, dtype_beside, keep_layout, size_of
from distill_llm.models.cut_sizes import cut_config, first_layers, sizes_after
from distill_llm.models.folder import is_adapter
from distill_llm.models.fresh import auto_class, config_class, drawn, fresh_model, weightless
from distill_llm.models.hub import from_hub
from distill_llm.models.quantize import can_be_read, cast_quantized, is_quantized, must_learn
from distill_llm.models.vision import (
    MODEL_TYPE,
    check_sections,
    fresh_painter,
    head_words,
    is_mixed,
    is_vision,
    read_painter,
    settled,
    with_start_token,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from distill_llm.models.cut import Kept
    from distill_llm.models.picture import Painter
    from distill_llm.models.spec import Bits, StudentSpec

_weightless: ContextVar[bool] = ContextVar("weightless", default=False)


@contextmanager
def without_weights() -> Iterator[None]:
    """While it lasts, models are made of their configs alone; what is in their weights is not asked for."""
    token = _weightless.set(True)
    try:
        yield
    finally:
        _weightless.reset(token)


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
        """Quantized weights are counted as the weights that they stand for."""
        return sum(size_of(weight).numel() for weight in self.model.parameters())


def build_student(
    spec: StudentSpec, tokenizer: Any, *, where: str = "student", kept: Kept | None = None
) -> LoadedModel:
    """The student before training, for a tokenizer that ``load_tokenizer`` gave.

    ``kept``: what its cut keeps, where that was measured; a cut that has to be measured needs it.
    """
    if spec.config:
        model = fresh_model(spec, tokenizer, f"{where}.config")
        _set_attention(model, spec, where)
        painter = fresh_painter(spec.picture, model.config, where=where) if spec.picture else None
        return LoadedModel(model, tokenizer, painter)
    if spec.fresh or (spec.cut is not None and _weightless.get()):  # of its sizes alone
        model = drawn(student_config(spec, where=where))
    elif spec.load_in == "full":
        model = load_model(spec.model, spec.revision, where=f"{where}.model")
        must_learn(model.config, where=f"{where}.model")
        if spec.cut is not None:
            from distill_llm.models.cut import choose, cut_model

            kept = kept or choose(model, spec.cut, None, where=f"{where}.cut")
            model = cut_model(model, kept, where=f"{where}.cut")
    else:
        model = _quantized_student(spec, where)
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


def _quantized_student(spec: StudentSpec, where: str) -> Any:
    """What is not quantized stays in float32; 4-bit weights are computed with in bfloat16 where a GPU has it."""
    import torch

    device = choose_device("auto", where=where)
    computes_in = "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"
    kinds: dict[str, Any] = {"dtype": "float32", "load_in": spec.load_in, "computes_in": computes_in}
    model = load_on(device, spec.model, spec.revision, where=f"{where}.load_in", **kinds)
    keep_layout(model, trains=True)
    for weight in model.parameters():
        weight.requires_grad_(False)  # adapters learn, and nothing else
    return model


def _set_attention(model: Any, spec: StudentSpec, where: str) -> None:
    if spec.attention == "auto":
        return
    from distill_llm.models.attention import prepare_flex, set_attention

    if spec.attention == "flex_attention":
        prepare_flex(model, where=where)
    try:
        set_attention(model, spec.attention)
    except (ImportError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"{where}.attention: {type(model).__name__} cannot have '{spec.attention}' here: {reason} Remove "
            "`attention`, or install what it needs."
        ) from None


def check_student(spec: StudentSpec, *, where: str = "student") -> bool:
    """Raises ConfigError where the student's model or tokenizer cannot be had; gives whether it is an encoder-decoder.

    Loads no weights.
    """
    if spec.picture is not None:
        from distill_llm.models.picture import check_pillow

        check_pillow(f"{where}.picture")
    if spec.config:
        is_encoder_decoder = bool(getattr(config_class(spec.config, f"{where}.config")(), "is_encoder_decoder", False))
        if spec.picture is not None:
            check_sections(spec.config, spec.picture, f"{where}.config")
    else:
        config = read_config(spec.model, spec.revision, where=f"{where}.model")
        must_learn(config, where=f"{where}.model")
        is_encoder_decoder = bool(config.is_encoder_decoder)
        if is_mixed(config):
            raise ConfigError(
                f"{where}.model: '{spec.model}' ({config.model_type}) reads pictures within a text, and a student "
                "reads one of the two. It can teach by soft labels (`teachers`, kind frozen, with `view.picture`)."
            )
        if is_vision(config) != (spec.picture is not None):
            reads, do = ("pictures", "add") if is_vision(config) else ("text", "remove")
            raise ConfigError(
                f"{where}.model: '{spec.model}' ({config.model_type}) reads {reads}: {do} `{where}.picture`. Pictures "
                f"are read by models of the type {MODEL_TYPE}."
            )
        student_config(spec, where=where)
    if spec.prefix_side == "decoder" and not is_encoder_decoder:
        raise ConfigError(
            f"{where}.prefix_side: 'decoder' needs an encoder-decoder, and this student is decoder-only: it has one "
            "side. Remove `prefix_side`."
        )
    check_bits(spec.model, spec.load_in, where=where)
    if isinstance(spec.tokenizer, str):
        load_tokenizer(spec, (), where=where)
    return is_encoder_decoder


def student_config(spec: StudentSpec, *, where: str = "student", begun: Any = None) -> Any:
    """The config of a student that is made of a `model`, with its cut; loads no weights.

    ``begun`` is the config of that model, where it does not lie anywhere yet.
    """
    config = read_config(spec.model, spec.revision, where=f"{where}.model") if begun is None else begun
    if spec.cut is None:
        return config
    sizes = sizes_after(config, spec.cut, f"{where}.cut")
    return cut_config(config, sizes, first_layers(sizes), f"{where}.cut")


def parameters_of(spec: StudentSpec, tokenizer: Any, *, where: str = "student", begun: Any = None) -> int:
    """Parameters of a student, adapters aside, without its weights; ``begun`` is that of ``student_config``."""
    bare = spec.model_copy(update={"lora": None})
    return LoadedModel(weightless_student(bare, tokenizer, where=where, begun=begun), tokenizer).num_parameters


def weightless_student(spec: StudentSpec, tokenizer: Any, *, where: str = "student", begun: Any = None) -> Any:
    """A student with its adapters, whose weights have shapes and no numbers; ``begun``: that of ``student_config``."""
    import torch

    with torch.device("meta"):
        if spec.config:
            return fresh_model(spec, tokenizer, f"{where}.config")
        config = student_config(spec, where=where, begun=begun)
        model = auto_class(config).from_config(config)
        if spec.lora is not None:
            from distill_llm.models.lora import add_lora

            model = add_lora(model, spec.lora, spec.revision)
        return model


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
    if _weightless.get():
        return _of_config(read_config(source, revision, where=where), where, dtype)
    if is_adapter(source):
        from distill_llm.models.lora import load_with_adapter

        return load_with_adapter(source, where=where, dtype=dtype)
    config = read_config(source, revision, where=where)
    model_class = auto_class(config)
    if not can_be_read(config, where=where):
        model = from_hub(model_class.from_pretrained, source, revision, where=where, what="weights", dtype=dtype)
        return settled(model, where)
    model = from_hub(model_class.from_pretrained, source, revision, where=where, what="weights", dtype="auto")
    return settled(cast_quantized(model, dtype), where)


def _of_config(config: Any, where: str, dtype: str) -> Any:
    import torch

    stored = getattr(config, "dtype", None) or "float32"
    name = str(stored if dtype == "auto" else dtype).removeprefix("torch.")
    return settled(auto_class(config).from_config(config, dtype=getattr(torch, name)), where)


def load_on(
    device: str,
    source: str,
    revision: str,
    *,
    where: str,
    dtype: str,
    load_in: Bits = "full",
    computes_in: str = "",
) -> Any:
    """A model for inference, on a device that ``choose_device`` gave; ``load_in``: fewer bits a weight.

    ``dtype``: of what is not quantized; ``computes_in``: of the arithmetic with 4-bit weights, if it is another.
    """
    if load_in == "full":
        return load_model(source, revision, where=where, dtype=dtype).to(device)
    check_bits(source, load_in, where=where)
    dtype = dtype_beside(load_in) if dtype == "auto" else dtype
    if _weightless.get():
        return count_in_bits(_of_config(read_config(source, revision, where=where), where, dtype), load_in)
    model_class = auto_class(read_config(source, revision, where=where))
    options = {
        "quantization_config": bits_config(load_in, computes_in or dtype),
        "device_map": {"": device},
        "dtype": dtype,
    }
    model = from_hub(model_class.from_pretrained, source, revision, where=where, what="weights", **options)
    keep_layout(model)
    return settled(model, where)


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
    if is_quantized(read_config(source, where=where)):
        raise ConfigError(f"{where}: the weights of '{source}' are quantized already. Set `load_in: full`.")


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
    model = weightless(read_config(source, revision, where=where))
    return sum(weight.numel() for weight in model.parameters())
