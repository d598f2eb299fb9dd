"""Whether a decoder-only model can read several rows as one sequence, and whether it gains by it."""

from __future__ import annotations

from typing import Any

from distill_llm.core.errors import ConfigError

_VARLEN = ("flash_attention", "flex_attention")


def gains_by_packing(model: Any) -> bool:
    """Whether its attention skips what belongs to other rows. Others compute it, and mask it afterwards."""
    return str(model.config._attn_implementation).startswith(_VARLEN)


def check_packing(model: Any) -> None:
    """Raises ConfigError where the model lets a row of a packed sequence see the rows before it.

    Two tokens behind two others must say what they say alone: a model that does not know of packing would say
    otherwise, or refuse positions.
    """
    import torch

    size = model.get_input_embeddings().weight.size(0)
    rows = torch.tensor([[1 % size, 2 % size, 3 % size, 4 % size]], device=model.device)
    positions = torch.tensor([[0, 1, 0, 1]], device=model.device)
    was_training, rough = model.training, gains_by_packing(model)  # such kernels know 16 bits only
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=rough):
            alone = model(input_ids=rows[:, 2:], use_cache=False).logits.float()
            packed = model(input_ids=rows, position_ids=positions, use_cache=False).logits[:, 2:].float()
    except TypeError as error:
        raise _cannot(model, str(error)) from None
    finally:
        model.train(was_training)
    if (packed - alone).abs().max() > (2e-2 if rough else 1e-4) * alone.abs().max():
        raise _cannot(model, "a row saw the one before it")


def _cannot(model: Any, why: str) -> ConfigError:
    return ConfigError(
        f"train.packing: {type(model).__name__} cannot read several rows as one sequence ({why}). Set "
        "`train.packing: never`."
    )
