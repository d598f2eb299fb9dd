"""A smaller model out of a larger one's weights: an ordinary model of its config, with some of its layers and units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from distill_llm.models.anatomy import HIDDEN, Axis, Family, Sizes, Stack, Weight, family_of, weights_in
from distill_llm.models.cut_sizes import cut_config, sizes_after
from distill_llm.models.cut_spec import Choice, Cut, Layers, LayersOfEach
from distill_llm.models.fresh import auto_class

if TYPE_CHECKING:
    from torch import Tensor

    from distill_llm.models.importance import Importance


@dataclass(frozen=True, slots=True)
class Kept:
    """What stays of a model: layers of each stack, units of each space (``Axis.space``), by their places in the whole.

    ``norms``: factors on the weights of norms, by name. A norm divides by the size of all hidden states; with fewer of
    them it would divide by another one. Spaces that are not named stay whole.
    """

    layers: Mapping[Stack, Sequence[int]]
    units: Mapping[str, Sequence[int]]
    norms: Mapping[str, float] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """As JSON holds it, and ``Kept(**facts)`` makes it again."""
        return asdict(self)


def choose(model: Any, cut: Cut, importance: Importance | None, *, where: str) -> Kept:
    """What a cut keeps of a model; ``importance`` is what was measured, where the cut asks for that."""
    assert importance is not None or not cut.measures, "this cut has to be measured first"
    family, weights = family_of(model.config, where), weights_in(model, where)
    whole, sizes = family.sizes_of(model.config), sizes_after(model.config, cut, where)
    layers = {
        stack: _chosen_layers(stack, whole.layers[stack], number, cut, importance)
        for stack, number in sizes.layers.items()
    }
    units: dict[str, list[int]] = {}
    grouped = {axis.space for axis in _axes(weights) if axis.unit == "groups"}
    for axis in _axes(weights):
        if sizes.of(axis.unit) == whole.of(axis.unit) or axis.space in units or axis.unit == "groups":
            continue
        scores = importance.units[axis.space] if importance is not None else None
        of_groups = axis.space.replace("heads", "groups")
        if axis.unit == "heads" and of_groups in grouped:
            units[of_groups], units[axis.space] = _grouped(whole, sizes, cut.by, scores)
        else:
            units[axis.space] = _picked(whole.of(axis.unit), sizes.of(axis.unit), cut.by, scores)
    return Kept(layers, units, _norm_factors(model.config, weights, whole, sizes, units, importance))


def cut_model(model: Any, kept: Kept, *, where: str) -> Any:
    """A model of what is kept, on the CPU, with the weights' own numbers; ``model`` stays as it is."""
    import torch
    from transformers.initialization import no_init_weights

    family, weights = family_of(model.config, where), weights_in(model, where)
    config = cut_config(model.config, _sizes_of(family, model.config, kept), kept.layers, where)
    with torch.random.fork_rng(devices=[]), no_init_weights():
        found = auto_class(config).from_config(config, dtype=model.dtype)
    _share_as(model, found)
    there, tensors = dict(model.named_parameters()), dict(found.named_parameters())
    names = {name for weight in weights if (name := _name_after(weight, family, kept)) is not None}
    assert names == set(tensors), f"{names ^ set(tensors)}: the cut model has other weights"
    with torch.no_grad():
        for weight in weights:
            name = _name_after(weight, family, kept)
            if name is not None:
                tensors[name].copy_(_part(there[weight.name], weight, kept))
    found.generation_config = model.generation_config
    return found.train(model.training)


def _share_as(model: Any, found: Any) -> None:
    """Lets two names stand for one weight where they do in ``model``, whatever its config says of that."""
    first: dict[int, str] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        shared = first.setdefault(id(tensor), name)
        if shared != name:
            holder, _, own = name.rpartition(".")
            setattr(found.get_submodule(holder), own, found.get_parameter(shared))


def _axes(weights: Sequence[Weight]) -> list[Axis]:
    return [axis for weight in weights for axis in weight.axes if axis is not None]


def _name_after(weight: Weight, family: Family, kept: Kept) -> str | None:
    """A weight's name in the cut model; None where its layer is gone."""
    if weight.layer is None:
        return weight.name
    if weight.layer not in kept.layers[weight.stack]:
        return None
    before = family.block(weight.stack, weight.layer)
    return family.block(weight.stack, list(kept.layers[weight.stack]).index(weight.layer)) + weight.name[len(before) :]


def _part(tensor: Tensor, weight: Weight, kept: Kept) -> Tensor:
    import torch

    for number, axis in enumerate(weight.axes):
        if axis is not None and axis.space in kept.units:
            places = torch.tensor(kept.units[axis.space], device=tensor.device)[:, None] * axis.width
            places = (places + torch.arange(axis.width, device=tensor.device)).flatten()
            tensor = tensor.index_select(number, places)
    return tensor * kept.norms[weight.name] if weight.name in kept.norms else tensor


def _sizes_of(family: Family, config: Any, kept: Kept) -> Sizes:
    whole = family.sizes_of(config)
    found = {"heads": whole.heads, "groups": whole.groups, "neurons": whole.neurons, "hidden": whole.hidden}
    for space, units in kept.units.items():
        found["heads" if space.endswith("cross") else space.rpartition(".")[2]] = len(units)
    if whole.groups == whole.heads:
        found["groups"] = found["heads"]
    return Sizes({stack: len(layers) for stack, layers in kept.layers.items()}, **found)


def _chosen_layers(stack: Stack, there: int, number: int, cut: Cut, importance: Importance | None) -> list[int]:
    asked: Layers = getattr(cut.layers, stack) if isinstance(cut.layers, LayersOfEach) else cut.layers
    if not isinstance(asked, int):
        return list(asked)
    scores = importance.layers.get(stack) if importance is not None else None
    return _picked(there, number, cut.by, scores) if number < there else list(range(there))


def _picked(there: int, number: int, by: Choice, scores: Sequence[float] | None) -> list[int]:
    """``number`` of the places 0 to ``there`` - 1, in order; of equal scores the first."""
    if by == "importance":
        assert scores is not None
        return sorted(sorted(range(there), key=lambda place: -scores[place])[:number])
    if by == "spread":
        return [round(place * (there - 1) / max(1, number - 1)) for place in range(number)]
    return list(range(number)) if by == "first" else list(range(there - number, there))


def _grouped(whole: Sizes, sizes: Sizes, by: Choice, scores: Sequence[float] | None) -> tuple[list[int], list[int]]:
    """Groups and query heads that stay: whole groups, or as many heads out of each."""
    size = whole.heads // whole.groups
    members = [list(range(group * size, (group + 1) * size)) for group in range(whole.groups)]
    if sizes.groups < whole.groups:
        sums = [sum(scores[head] for head in heads) for heads in members] if scores is not None else None
        groups = _picked(whole.groups, sizes.groups, by, sums)
        return groups, [head for group in groups for head in members[group]]
    left = sizes.heads // sizes.groups
    heads: list[int] = []
    for own in members:
        places = _picked(size, left, by, [scores[head] for head in own] if scores is not None else None)
        heads += [own[place] for place in places]
    return list(range(whole.groups)), heads


def _norm_factors(
    config: Any,
    weights: Sequence[Weight],
    whole: Sizes,
    sizes: Sizes,
    units: Mapping[str, Sequence[int]],
    importance: Importance | None,
) -> dict[str, float]:
    """What makes up for the hidden states that are gone: a norm's root mean square over d of D states is
    sqrt(D / d * their share of all squares) times what it was. Unmeasured, they have their share: nothing to make up.
    """
    if HIDDEN not in units:
        return {}
    factors: dict[str, float] = {}
    for weight in weights:
        if not weight.is_norm:
            continue
        factor = 1.0
        if importance is not None:
            squares = importance.squares[weight.name]
            share = sum(squares[place] for place in units[HIDDEN]) / max(sum(squares), 1e-30)
            factor = math.sqrt(whole.hidden / sizes.hidden * share)
        if weight.name == "decoder.final_layer_norm.weight" and _scales_by_width(config):
            factor *= math.sqrt(sizes.hidden / whole.hidden)
        factors[weight.name] = factor
    return factors


def _scales_by_width(config: Any) -> bool:
    """Whether what the head reads is divided by the root of the width, as in T5 up to version 1.0."""
    return config.model_type == "t5" and getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
