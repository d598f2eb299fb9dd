"""LoRA adapters on a student, through peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill_llm.models.spec import LoraSpec


def add_lora(model: Any, spec: LoraSpec, revision: str = "main") -> Any:
    """The model with trainable adapters on a frozen base; the adapters remember the base's ``revision``."""
    from peft import LoraConfig, get_peft_model

    modules = "all-linear" if spec.modules == "all_linear" else list(spec.modules)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
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


def load_with_adapter(folder: str, *, where: str, dtype: str = "float32") -> Any:
    """A saved adapter, merged into the base model that it names."""
    from peft import PeftModel

    from distill_llm.models.load import load_model

    source, revision = base_of(folder)
    model = load_model(source, revision, where=f"{where} (base of the adapter)", dtype=dtype)
    return PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).merge_and_unload()
