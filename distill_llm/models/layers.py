"""A model's layers: their number and width, their attention made visible, and the heads learned beside a student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill_llm.core.errors import ConfigError, StorageError
from distill_llm.core.features import Look, Reading, Shape, Side
from distill_llm.models.attention import set_attention
from distill_llm.models.forward import forward
from distill_llm.models.peers import Peers
from distill_llm.models.vision import blank_picture, is_vision

if TYPE_CHECKING:
    from distill_llm.core.signals import Batch

_NAME, _FILE = "hint_heads", "hint_heads.safetensors"


def shapes_of(model: Any) -> dict[Side, Shape]:
    """Layers and width of each side of a model, found by passing one token (and one blank picture) through it."""
    device = next(model.parameters()).device
    one = torch.zeros(1, 1, dtype=torch.long, device=device)
    batch: Batch = {"input_ids": one, "attention_mask": one + 1}
    if is_vision(model.config):
        batch = {"pixel_values": blank_picture(model)}
    sides: list[Side] = ["decoder"]
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = one
        sides.append("encoder")
    was_training = model.training
    model.eval()
    with torch.no_grad():
        passed = forward(model, batch, Reading(hidden=frozenset(sides)))
    model.train(was_training)
    shapes: dict[Side, Shape] = {}
    for side in sides:
        states = passed.hidden(side)
        shapes[side] = Shape(len(states) - 1, states[-1].size(-1))
    return shapes


def show_attention(model: Any, looks: Sequence[Look], *, where: str) -> None:
    """Lets the model give its attention probabilities, without dropout on them; nothing where ``looks`` is empty.

    Raises ConfigError where it has no eager attention, or no attention of a kind that is asked for.
    """
    if not looks:
        return
    if not model.config.is_encoder_decoder and set(looks) != {"self"}:
        raise ConfigError(
            f"{where}: it is decoder-only, and has no {sorted(set(looks) - {'self'})} attention. Use `of: self`."
        )
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    try:
        set_attention(inner, "eager")
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{where}: it has no eager attention, which shows what tokens look at: {error}") from None
    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            for name in ("dropout", "attention_dropout", "dropout_p"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)


def add_heads(model: Any, widths: Mapping[str, Sequence[tuple[int, int]]]) -> None:
    """Linear heads on a student, under the name of each term: one for each pair of widths (student's, teacher's).

    They are submodules, so that they are trained, moved and wrapped with it; ``without_heads`` leaves them out of what
    is saved as the model.
    """
    wanted = {name: pairs for name, pairs in widths.items() if pairs}
    if not wanted:
        return
    device = next(model.parameters()).device
    heads = {name: nn.ModuleList(nn.Linear(*pair) for pair in pairs) for name, pairs in wanted.items()}
    setattr(model, _NAME, nn.ModuleDict(heads).to(device))


def heads_of(model: Any) -> dict[str, list[nn.Module]]:
    """The heads on a student, wrapped as it may be, by term; none where it has none."""
    return {name: list(heads) for name, heads in _heads(model).items()}


def _heads(model: Any) -> Any:
    from accelerate.utils import extract_model_from_parallel

    inner = extract_model_from_parallel(model, keep_fp32_wrapper=True)
    return getattr(inner, _NAME, nn.ModuleDict())


def _holders(model: Any) -> dict[str, Any]:
    """Who may have heads, and what the names of their weights begin with: the student, or each of several peers."""
    from accelerate.utils import extract_model_from_parallel

    inner = extract_model_from_parallel(model, keep_fp32_wrapper=True)
    if not isinstance(inner, Peers):
        return {"": inner}
    return {f"peers.{number}.": peer for number, peer in enumerate(inner.peers)}


def anchor_of(model: Any) -> Tensor | float:
    """A zero through which the heads get a gradient where no term has a token for them: DDP waits for all weights."""
    return sum((weight.sum() * 0.0 for weight in head_weights(model).values()), 0.0)


def without_heads(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A student's weights without those of its heads."""
    return {name: weight for name, weight in state.items() if not name.startswith(f"{_NAME}.")}


def drop_heads(model: Any) -> None:
    """Takes the heads off a student that was trained."""
    if hasattr(model, _NAME):
        delattr(model, _NAME)


def head_weights(model: Any) -> dict[str, Tensor]:
    """The weights of the heads alone, by the names that ``without_heads`` leaves out."""
    return {
        f"{begin}{_NAME}.{name}": weight
        for begin, holder in _holders(model).items()
        for name, weight in _heads(holder).named_parameters()
    }


def save_heads(model: Any, folder: Path) -> None:
    """Adds the heads to a checkpoint; nothing where there are none."""
    weights = head_weights(model)
    if weights:
        save_file({name: weight.detach().contiguous() for name, weight in weights.items()}, folder / _FILE)


def load_heads(model: Any, folder: Path) -> None:
    """Gives the heads the weights of a checkpoint. Raises StorageError where it has none, or those of other terms."""
    weights = head_weights(model)
    if not weights:
        return
    try:
        saved = load_file(folder / _FILE)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(saved[name])
    except (FileNotFoundError, KeyError, RuntimeError) as error:
        raise StorageError(
            f"{folder / _FILE}: this checkpoint lacks the hint heads {sorted(weights)} ({error}). It is "
            "from a training with another objective: delete the folder of checkpoints and start again."
        ) from None
