"""Weights that are zero, so many of each matrix, in an ordinary model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from distill_llm.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distill_llm.models.spec import StudentSpec

Pattern = Literal["unstructured", "2:4"]
_GROUP, _ZEROS = 4, 2


def sparse_layers(model: Any, pattern: Pattern, *, where: str) -> Mapping[str, nn.Module]:
    """Linear layers but the head, and but those that a term on layers learns; weights may be without numbers.

    Raises ConfigError where there is none, or where the groups of a pattern do not fit one.
    """
    from torch import nn

    from distill_llm.models.layers import heads_of

    others = [model.get_output_embeddings(), *(one for heads in heads_of(model).values() for one in heads)]
    found = {
        name: part
        for name, part in model.named_modules()
        if type(part) is nn.Linear and all(part is not other for other in others)
    }
    if not found:
        raise ConfigError(
            f"{where}: {type(model).__name__} has no linear layer whose weights could be zero (those of GPT-2 are of "
            "another kind). Take another student."
        )
    for name, part in found.items():
        if pattern == "2:4" and part.in_features % _GROUP:
            raise ConfigError(
                f"{where}.pattern: {name} reads {part.in_features} numbers, which are no groups of {_GROUP}. Set "
                "pattern: unstructured, or take a student of other widths."
            )
    return found


def check_sparse(student: StudentSpec, pattern: Pattern, *, where: str) -> None:
    """Raises ConfigError where a student's layers cannot have such zeros; loads no weights."""
    from distill_llm.models.load import weightless_student
    from distill_llm.models.tokenizer import AnyWords

    sparse_layers(weightless_student(student, AnyWords()), pattern, where=where)


def keep_zeros(layers: Mapping[str, nn.Module]) -> None:
    """From now on a weight that is zero has no gradient."""
    for part in layers.values():
        weight = _weight(part)
        weight.register_hook(lambda gradient, weight=weight: gradient * (weight != 0))


def make_zeros(layers: Mapping[str, nn.Module], pattern: Pattern, share: float) -> None:
    """Of each matrix the weights of the smallest magnitude become zero, a share of them; those that are zero count.

    2:4: of so many groups of four weights of a row the two smallest, first where these are smallest.
    """
    import torch

    with torch.no_grad():
        for part in layers.values():
            _zero(_weight(part), pattern, share)


def _zero(weight: Tensor, pattern: Pattern, share: float) -> None:
    if pattern == "unstructured":
        flat = weight.view(-1)
        flat[flat.abs().argsort(stable=True)[: round(share * flat.numel())]] = 0
        return
    groups = weight.view(-1, _GROUP)
    smallest = groups.abs().argsort(dim=1, stable=True)[:, :_ZEROS]
    lost = groups.gather(1, smallest).square().sum(1)
    chosen = lost.argsort(stable=True)[: round(share * len(groups))]
    groups[chosen] = groups[chosen].scatter(1, smallest[chosen], 0)


@contextmanager
def with_zeros(layers: Mapping[str, nn.Module], pattern: Pattern, share: float) -> Iterator[None]:
    """The layers with that share of zeros, and afterwards as they were."""
    before: dict[str, Tensor] = {name: _weight(part).detach().clone() for name, part in layers.items()}
    make_zeros(layers, pattern, share)
    try:
        yield
    finally:
        for name, part in layers.items():
            _weight(part).data.copy_(before[name])


def _weight(part: nn.Module) -> Tensor:
    return part.weight  # pyright: ignore[reportReturnType]
