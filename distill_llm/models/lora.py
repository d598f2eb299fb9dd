"""LoRA adapters on a student, through peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_llm.core.files import read_json, write_json

if TYPE_CHECKING:
    from distill_llm.models.spec import Bits, LoraSpec

_BITS_FILE = "base_quantization.json"


def add_lora(model: Any, spec: LoraSpec, revision: str = "main") -> Any:
    """The model with trainable adapters on a frozen base; the adapters remember the base's ``revision``."""
    from peft import LoraConfig, get_peft_model

    named: dict[str, Any] = {"all_linear": "all-linear", "by_architecture": None}
    modules = named[spec.modules] if isinstance(spec.modules, str) else list(spec.modules)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        use_dora=spec.dora,
        use_rslora=spec.rank_stabilized,
        target_modules=modules,
        # peft's own class for encoder-decoders calls a method that transformers 5 no longer has; without a task type
        # peft wraps any model, and forward and generate are the model's own.
        task_type=None if model.config.is_encoder_decoder else "CAUSAL_LM",
        revision=revision,
    )
    return get_peft_model(model, config)


def base_of(folder: str) -> tuple[str, str]:
    """The model that a saved adapter belongs on, and its revision."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    return config["base_model_name_or_path"], config.get("revision") or "main"


def has_bits(folder: Path) -> bool:
    """Whether the base below a saved adapter was quantized while it learned."""
    return (folder / _BITS_FILE).is_file()


def save_bits(model: Any, folder: Path) -> None:
    """Writes how the base below adapters is quantized, which peft does not keep; nothing where it is not."""
    bits = getattr(model.config, "quantization_config", None)
    if bits is not None and hasattr(model, "peft_config"):
        write_json(folder / _BITS_FILE, bits.to_dict())


def load_with_adapter(folder: str, *, where: str, dtype: str = "float32") -> Any:
    """A saved adapter, merged into the base model that it names.

    A base that was quantized while the adapter learned is quantized again, so that the whole says the same.
    """
    import torch
    from peft import PeftModel

    from distill_llm.models.load import load_model, load_on

    source, revision = base_of(folder)
    where_base = f"{where} (base of the adapter)"
    if has_bits(Path(folder)):
        load_in: Bits = "4bit" if read_json(Path(folder) / _BITS_FILE)["load_in_4bit"] else "8bit"
        kept = "float32" if dtype == "auto" else dtype
        model = load_on("cpu", source, revision, where=where_base, dtype=kept, load_in=load_in).dequantize()
        model = model.to(getattr(torch, kept))
    else:
        model = load_model(source, revision, where=where_base, dtype=dtype)
    return PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).merge_and_unload()
