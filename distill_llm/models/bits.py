"""Weights of 8 and 4 bits, through bitsandbytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill_llm.models.spec import Bits


def bits_config(load_in: Bits, dtype: str) -> Any:
    """How transformers is to quantize: int8 (Dettmers et al. 2022, arXiv:2208.07339), or nf4 with quantized constants
    (Dettmers et al. 2023, arXiv:2305.14314, sec. 3) that is computed with in ``dtype``."""
    from transformers import BitsAndBytesConfig

    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def dtype_beside(load_in: Bits) -> str:
    """Of what is not quantized: the one that the kernels compute in."""
    return "float16" if load_in == "8bit" else "bfloat16"


def keep_layout(model: Any, *, trains: bool = False) -> None:
    """Keeps bitsandbytes from laying 4-bit weights out anew for inference where that breaks a model.

    It does so on a CPU with AVX512-BF16, at the first pass in eval mode: it fails for sizes that are no multiples of
    its blocks, and of a model that ``trains`` later passes lose the gradient to what lies below, without an error.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            state = weight.quant_state
            rows, columns = state.shape
            if trains or rows % 32 or columns % state.blocksize:
                module.support_avx512bf16_for_cpu = False


def count_in_bits(model: Any, load_in: Bits) -> Any:
    """Notes on a model without weights what its quantized ones would take, as ``stored_bytes`` of each; not those of
    the head, which stays as it is.

    Of 4 bits: a byte for every 64 more, and four for every 256 of those.
    """
    from torch import nn

    a_weight = {"8bit": 1.0, "4bit": 0.5 + (1 + 4 / 256) / 64}[load_in]
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            weight: Any = module.weight
            weight.stored_bytes = round(a_weight * weight.numel())
    return model


def size_of(weight: Any) -> Any:
    """The shape of the weights that a tensor stands for; a packed one has two of 4 bits in a byte."""
    state = getattr(weight, "quant_state", None)
    return weight.shape if state is None else state.shape
