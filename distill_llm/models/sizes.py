"""Sizes of models between a larger and a smaller one of the same type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill_llm.models.spec import HubConfig

# A width must be a multiple of its heads (twice that: rotary positions turn pairs), and heads one of key-value heads.
_WIDTH = ("d_model", "hidden_size", "n_embd")
_HEADS = (
    "num_heads",
    "num_attention_heads",
    "n_head",
    "encoder_attention_heads",
    "decoder_attention_heads",
)
_KEY_VALUE_HEADS = "num_key_value_heads"
_OTHERS = (
    "d_kv",
    "d_ff",
    "head_dim",
    "intermediate_size",
    "n_inner",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "num_layers",
    "num_decoder_layers",
    "num_hidden_layers",
    "n_layer",
    "encoder_layers",
    "decoder_layers",
)


def sizes_between(teacher: Any, student: HubConfig, number: int) -> list[dict[str, Any]]:
    """The sizes of ``number`` models from a teacher's config down to a student's, each the same ratio below the last.

    Rounded to what a model can have. Raises ValueError where the two are of different types, or of the same sizes.
    """
    from transformers import CONFIG_MAPPING

    model_type = str(student["model_type"])
    if teacher.model_type != model_type:
        raise ValueError(f"the teacher is a {teacher.model_type} and the student a {model_type}: nothing lies between")
    sizes_of: Any = CONFIG_MAPPING[model_type]
    smallest = sizes_of(**{key: value for key, value in student.items() if key != "model_type"})
    known = [key for key in (*_WIDTH, *_HEADS, _KEY_VALUE_HEADS, *_OTHERS) if _is_size(teacher, smallest, key)]
    ends = {key: (getattr(teacher, key), getattr(smallest, key)) for key in known}
    if not ends:
        raise ValueError(f"a {model_type} has its sizes in sections, between which nothing is derived")
    if all(large == small for large, small in ends.values()):
        raise ValueError("teacher and student have the same sizes")
    found = []
    for place in range(1, number + 1):
        share = place / (number + 1)
        between = {key: large ** (1 - share) * small**share for key, (large, small) in ends.items()}
        sizes = _rounded(between)
        if _splits_its_width(teacher) and _splits_its_width(smallest):
            sizes["head_dim"] = next(sizes[key] for key in _WIDTH if key in sizes) // sizes["num_attention_heads"]
        found.append({key: value for key, value in sizes.items() if ends[key] != (value, value)})
    return found


def _splits_its_width(config: Any) -> bool:
    """Whether its heads share the width among them, as most do, and have no width of their own."""
    if "head_dim" in config.attribute_map:
        return False
    head, heads = getattr(config, "head_dim", None), getattr(config, "num_attention_heads", None)
    return isinstance(head, int) and isinstance(heads, int) and head * heads == config.hidden_size


def _is_size(teacher: Any, student: Any, key: str) -> bool:
    """Of two models of one config class, whose attributes they share; aliases of another key are left out."""
    if key in getattr(student, "attribute_map", {}):
        return False
    return all(type(getattr(config, key, None)) is int for config in (teacher, student))


def _rounded(between: dict[str, float]) -> dict[str, int]:
    sizes = {key: max(1, round(value)) for key, value in between.items()}
    heads = [sizes[key] for key in _HEADS if key in sizes]
    if _KEY_VALUE_HEADS in sizes and heads:
        divisors = [count for count in range(1, heads[0] + 1) if heads[0] % count == 0]
        sizes[_KEY_VALUE_HEADS] = min(divisors, key=lambda count: abs(count - between[_KEY_VALUE_HEADS]))
    if len(set(heads)) > 1:  # an encoder's and a decoder's share one width
        for key in _HEADS:
            if key in sizes:
                sizes[key] = heads[0]
    for key in _WIDTH:
        if key in sizes:
            step = 2 * heads[0] if heads else 2
            sizes[key] = max(step, step * round(between[key] / step))
    if "head_dim" in sizes:
        sizes["head_dim"] = max(2, 2 * round(between["head_dim"] / 2))
    return sizes
