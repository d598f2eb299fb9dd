"""LoRA adapters on a student, through peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill_llm.models.spec import LoraSpec


def add_lora(model: Any, spec: LoraSpec) -> Any:
    """The model with trainable adapters on a frozen base."""
    from peft import LoraConfig, get_peft_model

    modules = "all-linear" if spec.modules == "all_linear" else list(spec.modules)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=modules,
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
    )
    return get_peft_model(model, config)


def load_with_adapter(folder: str, *, where: str) -> Any:
    """A saved adapter, merged into the base model that it names."""
    from peft import PeftModel

    from distill_llm.models.load import load_model

    base = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    model = load_model(
        base["base_model_name_or_path"], base.get("revision") or "main", where=f"{where} (base of the adapter)"
    )
    return PeftModel.from_pretrained(model, folder).merge_and_unload()
