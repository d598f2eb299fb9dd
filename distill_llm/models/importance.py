"""How much each layer, head, neuron and hidden state of a model does, measured on rows of text.

B rows, N tokens, D hidden size, U units, W numbers of a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distill_llm.core.signals import IGNORE_INDEX, Batch, signals_of
from distill_llm.models.anatomy import HIDDEN, Stack, Weight, family_of, weights_in
from distill_llm.models.cut import Kept, cut_model
from distill_llm.models.forward import forward

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@dataclass(frozen=True, slots=True)
class Importance:
    """``units`` of each space; ``layers`` of each stack. ``squares``: the mean square of each hidden state where a norm
    reads it, by the norm's weight."""

    layers: Mapping[Stack, Sequence[float]]
    units: Mapping[str, Sequence[float]]
    squares: Mapping[str, Sequence[float]]


def measure(model: Any, batches: Sequence[Batch], *, by_loss: bool, where: str) -> Importance:
    """In one pass without dropout and without a gradient; one more for each layer ``by_loss``.

    Hidden states: the root mean square of what the norms give out, summed over them (Muralidharan et al. 2024,
    arXiv:2407.14679, sec. 2.2, who compare several means). Heads and neurons: the mean square of what one adds to the
    hidden states; they take what it says before the matrix that writes it there, whose size would not count then. It
    comes as a share of its layer's sum, and where layers share heads, the shares of all are added up. Layers: 1 -
    cosine of what goes in and what comes out (Men et al. 2024, arXiv:2403.03853), or by how much the loss grows
    without one.
    """
    weights = weights_in(model, where)
    meters = {weight.name: _Outputs(weight) for weight in weights if weight.writes}
    norms = {weight.name: _Norm() for weight in weights if weight.is_norm}
    blocks = {name: _Turn() for name in _blocks(model, where)}
    was_training = model.training
    model.eval()
    with _watching(model, weights, meters | norms, blocks, where) as mask_of, torch.no_grad():
        for batch in batches:
            mask_of.update(_masks(batch))
            forward(model, batch)
    model.train(was_training)
    layers: dict[Stack, list[float]] = {}
    for name, (stack, _) in _blocks(model, where).items():
        layers.setdefault(stack, []).append(blocks[name].mean())
    if by_loss:
        layers = _losses_without(model, batches, where)
    squares = {name: norm.reads() for name, norm in norms.items()}
    return Importance(layers, _units(model, meters, norms), squares)


def _blocks(model: Any, where: str) -> dict[str, tuple[Stack, int]]:
    """The names of all layers' modules, those of a stack in order."""
    family = family_of(model.config, where)
    layers = family.sizes_of(model.config).layers
    return {family.block(stack, n): (stack, n) for stack, number in layers.items() for n in range(number)}


def _masks(batch: Batch) -> dict[Stack, Bool[Tensor, "B _"]]:
    """The tokens of each stack: all but padding; in a decoder beside an encoder, up to the last that is supervised."""
    read = batch["attention_mask"].bool()
    if "decoder_input_ids" not in batch:
        return {"decoder": read}
    supervised = (batch["labels"] != IGNORE_INDEX).long()
    return {"encoder": read, "decoder": supervised.flip(1).cumsum(1).flip(1) > 0}


class _Outputs:
    """Squares of what each unit adds through the matrix W behind it: trace of W G W', with G its numbers' products."""

    def __init__(self, weight: Weight):
        axis = weight.axes[1]
        assert axis is not None
        self.space, self._width, self._products, self._count = axis.space, axis.width, None, 0

    def see(self, reads: Float[Tensor, "N D"], writes: Tensor) -> None:
        units = reads.unflatten(1, (-1, self._width)).double()
        products = torch.einsum("nuv,nuw->uvw", units, units)
        self._products = products if self._products is None else self._products + products
        self._count += len(reads)

    def squares(self, matrix: Float[Tensor, "D UW"]) -> list[float]:
        assert self._products is not None
        parts = matrix.double().unflatten(1, (-1, self._width))
        return (torch.einsum("duv,duw,uvw->u", parts, parts, self._products) / self._count).tolist()


class _Norm:
    """What a norm reads and gives out."""

    def __init__(self) -> None:
        self._reads: Tensor | float = 0.0
        self._gives: Tensor | float = 0.0
        self._count = 0

    def see(self, reads: Float[Tensor, "N D"], writes: Float[Tensor, "N D"]) -> None:
        self._reads = self._reads + reads.double().square().sum(0)
        self._gives = self._gives + writes.double().square().sum(0)
        self._count += len(reads)

    def reads(self) -> list[float]:
        assert isinstance(self._reads, Tensor)
        return (self._reads / self._count).tolist()

    def gives(self) -> Tensor:
        assert isinstance(self._gives, Tensor)
        return (self._gives / self._count).sqrt()


class _Turn:
    """By how much a layer turns the hidden states."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def see(self, reads: Float[Tensor, "N D"], writes: Float[Tensor, "N D"]) -> None:
        turned = 1 - torch.cosine_similarity(reads.double(), writes.double())
        self._sum += float(turned.sum())
        self._count += len(reads)

    def mean(self) -> float:
        return self._sum / self._count


@contextmanager
def _watching(
    model: Any, weights: Sequence[Weight], meters: Mapping[str, Any], blocks: Mapping[str, Any], where: str
) -> Iterator[dict[Stack, Tensor]]:
    """Shows each meter what its module reads and gives out, of the tokens that the yielded masks name by stack."""
    masks: dict[Stack, Tensor] = {}
    stacks = {weight.name: weight.stack for weight in weights}
    seen: list[tuple[str, Stack, Any]] = [(name.rpartition(".")[0], stacks[name], one) for name, one in meters.items()]
    seen += [(name, stack, blocks[name]) for name, (stack, _) in _blocks(model, where).items()]

    def watch(stack: Stack, meter: Any) -> Callable[..., None]:
        def see(_: Any, inputs: tuple[Any, ...], options: dict[str, Any], outputs: Any) -> None:
            reads = inputs[0] if inputs else options["hidden_states"]
            writes = outputs[0] if isinstance(outputs, tuple) else outputs
            kept = masks[stack].to(reads.device)
            meter.see(reads[kept], writes[kept])

        return see

    hooks = [
        model.get_submodule(name).register_forward_hook(watch(stack, meter), with_kwargs=True)
        for name, stack, meter in seen
    ]
    try:
        yield masks
    finally:
        for hook in hooks:
            hook.remove()


def _units(model: Any, meters: Mapping[str, _Outputs], norms: Mapping[str, _Norm]) -> dict[str, list[float]]:
    tensors = dict(model.named_parameters())
    found: dict[str, list[float]] = {HIDDEN: torch.stack([norm.gives() for norm in norms.values()]).sum(0).tolist()}
    shared: dict[str, list[list[float]]] = {}
    for name, meter in meters.items():
        shared.setdefault(meter.space, []).append(meter.squares(tensors[name].detach()))
    for space, each in shared.items():
        shares = [[square / max(sum(squares), 1e-30) for square in squares] for squares in each]
        found[space] = [sum(of_all) for of_all in zip(*shares, strict=True)]
    return found


def _losses_without(model: Any, batches: Sequence[Batch], where: str) -> dict[Stack, list[float]]:
    """How much the mean loss of a token grows without each layer, in nats."""
    family = family_of(model.config, where)
    whole = {stack: list(range(number)) for stack, number in family.sizes_of(model.config).layers.items()}
    begun = _mean_loss(model, batches)
    found: dict[Stack, list[float]] = {}
    for stack, layers in whole.items():
        for layer in layers:
            rest = {**whole, stack: [one for one in layers if one != layer]}
            if not rest[stack]:
                found[stack] = [0.0]  # the only one stays, whatever it does
                continue
            without = cut_model(model, Kept(rest, {}), where=where).to(model.device)
            found.setdefault(stack, []).append(_mean_loss(without, batches) - begun)
    return found


def _mean_loss(model: Any, batches: Iterable[Batch]) -> float:
    from torch.nn.functional import cross_entropy

    was_training, total, count = model.training, 0.0, 0
    model.eval()
    with torch.no_grad():
        for batch in batches:
            passed = forward(model, batch)
            said = signals_of(passed.outputs.logits, batch, passed.at)
            total += float(cross_entropy(said.logits.float(), said.token_ids, reduction="sum"))
            count += len(said.token_ids)
    model.train(was_training)
    return total / max(count, 1)
