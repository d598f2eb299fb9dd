"""The sizes of a cut model: from its model's config and the recipe alone, whichever layers and units are kept."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

from distill_llm.core.errors import ConfigError
from distill_llm.models.anatomy import Family, Sizes, Stack, Weight, family_of, weights_in
from distill_llm.models.cut_spec import Cut, Layers, LayersOfEach
from distill_llm.models.fresh import auto_class

_STEPS = 8
"""A width goes down to a target in steps of about this share of it, rounded to a power of two, 64 at most."""


def sizes_after(config: Any, cut: Cut, where: str) -> Sizes:
    """Raises ConfigError where such a model cannot be cut, or not like this. Loads no weights."""
    family = family_of(config, where)
    whole = family.sizes_of(config)
    sizes = _given(whole, cut, where)
    if cut.has_target:
        sizes = _to_target(config, family, sizes, cut, where)
    _check(config, family, whole, sizes, where)
    return sizes


def cut_config(config: Any, sizes: Sizes, layers: Mapping[Stack, Sequence[int]], where: str) -> Any:
    """The config of a model of these sizes that keeps these ``layers`` of each stack."""
    from huggingface_hub.errors import StrictDataclassError

    family = family_of(config, where)
    found = copy.deepcopy(config)
    if hasattr(found, family.head_width) or sizes.hidden // sizes.heads != family.head_numbers(config):
        setattr(found, family.head_width, family.head_numbers(config))  # else it would follow from what is cut
    if getattr(found, "layer_types", None):
        found.layer_types = [config.layer_types[layer] for layer in layers["decoder"]]
    for stack, key in family.layers.items():
        setattr(found, key, sizes.layers[stack])
    for unit, key in family.sizes.items():
        setattr(found, key, sizes.of(unit))
    try:
        type(found).from_dict(found.to_dict())  # as it will be read: what it refuses then, it refuses now
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ConfigError(f"{where}: {type(found).__name__} refuses {sizes}: {error}") from None
    return found


def first_layers(sizes: Sizes) -> dict[Stack, list[int]]:
    return {stack: list(range(number)) for stack, number in sizes.layers.items()}


class _Count:
    """Parameters of a model with these weights, cut to some sizes.

    Weights that are alike are counted together: a target is looked for among many sizes.
    """

    def __init__(self, weights: Sequence[Weight], shapes: Mapping[str, Sequence[int]]):
        self._alike: Counter[Any] = Counter()
        for weight in weights:
            if weight.layer in (None, 0):  # all layers of a stack have the same shapes
                fixed = prod(
                    axis.width if axis else size for size, axis in zip(shapes[weight.name], weight.axes, strict=True)
                )
                units = tuple(axis.unit for axis in weight.axes if axis)
                self._alike[weight.stack if weight.layer == 0 else "", units, fixed] += 1

    def __call__(self, sizes: Sizes) -> int:
        total = 0
        for (stack, units, fixed), number in self._alike.items():
            times = sizes.layers[stack] if stack else 1
            total += times * number * fixed * prod(sizes.of(unit) for unit in units)
        return total


def _given(whole: Sizes, cut: Cut, where: str) -> Sizes:
    """The sizes that the recipe names; all else whole."""
    for unit in ("heads", "neurons", "hidden"):
        if getattr(cut, unit) > whole.of(unit):
            raise ConfigError(
                f"{where}.{unit}: {getattr(cut, unit)} are more than the {whole.of(unit)} that the model has. Expected "
                f"1 to {whole.of(unit)}."
            )
    heads, groups = _heads(whole, cut.heads or whole.heads, where)
    return Sizes(
        layers=_layers(whole, cut.layers, where),
        heads=heads,
        groups=groups,
        neurons=cut.neurons or whole.neurons,
        hidden=cut.hidden or whole.hidden,
    )


def _layers(whole: Sizes, layers: Layers | LayersOfEach, where: str) -> dict[Stack, int]:
    if isinstance(layers, LayersOfEach) and "encoder" not in whole.layers:
        raise ConfigError(f"{where}.layers: the model is decoder-only, and has one stack. Give a number or a list.")
    found: dict[Stack, int] = {}
    for stack, there in whole.layers.items():
        asked = getattr(layers, stack) if isinstance(layers, LayersOfEach) else layers
        number = (asked or there) if isinstance(asked, int) else len(asked)
        if number > there or (not isinstance(asked, int) and asked[-1] >= there):
            raise ConfigError(
                f"{where}.layers: {asked} of a {stack} that has {there} layers. Expected a number up to {there}, or "
                f"layers from 0 to {there - 1}."
            )
        found[stack] = number
    return found


def _heads(whole: Sizes, heads: int, where: str) -> tuple[int, int]:
    """Query heads and key-value heads: whole groups where that is possible, else as many heads out of each group."""
    group = whole.heads // whole.groups
    if heads % group == 0:
        return heads, heads // group
    if heads % whole.groups == 0:
        return heads, whole.groups
    raise ConfigError(
        f"{where}.heads: {heads} of {whole.heads} heads, {group} of which share each key-value head, are "
        f"neither whole groups nor as many out of each of the {whole.groups} groups. Expected a multiple of {group} or "
        f"of {whole.groups}."
    )


def _to_target(config: Any, family: Family, sizes: Sizes, cut: Cut, where: str) -> Sizes:
    """The largest sizes within the target, each free one in about the same ratio; what is left then goes to those that
    have room for a step."""
    import torch

    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    count = _Count(weights_in(model, where), shapes)
    whole = count(family.sizes_of(config))
    target = cut.parameters or round(cut.ratio * whole)
    options = _Options(config, family, sizes, cut)
    for share in options.shares():
        found = options.at(share)
        if options.fits(found) and count(found) <= target:
            break
    else:
        least = count(options.at(0.0))
        raise ConfigError(
            f"{where}: the model has {whole:,} parameters, and {least:,} at least when it is cut along "
            f"{list(cut.free)}: the target of {target:,} is not reached. Name more in `along`, or a larger target."
        )
    better: Sizes | None = found
    while better is not None:
        found = better
        above = options.a_step_above(found)
        better = next((one for one in above if options.fits(one) and count(one) <= target), None)
    return found


class _Options:
    """The sizes that a model can be cut to along the free dimensions."""

    def __init__(self, config: Any, family: Family, sizes: Sizes, cut: Cut):
        self._sizes, self._free = sizes, cut.free
        self._split = config.model_type in family.splits_hidden
        group = sizes.heads // sizes.groups
        # Whole groups, but of a single one the heads within.
        self._head_steps = group if sizes.groups > 1 else 1
        self._groups_of = group if sizes.groups > 1 else 0

    def shares(self) -> Iterator[float]:
        """From the whole down, each share at which some size changes."""
        found = {1.0}
        for number, step in self._steps():
            found |= {size / number for size in range(step, number + 1, step)}
        yield from sorted(found, reverse=True)

    def at(self, share: float) -> Sizes:
        layers, heads, neurons, hidden = dict(self._sizes.layers), *self._widths()
        if "layers" in self._free:
            layers = {stack: _down(number, share, 1) for stack, number in layers.items()}
        if "heads" in self._free:
            heads = _down(heads, share, self._head_steps)
        if "neurons" in self._free:
            neurons = _down(neurons, share, _step(neurons))
        if "hidden" in self._free:
            hidden = _down(hidden, share, heads if self._split else _step(hidden))
        return self._sized(layers, heads, neurons, hidden)

    def a_step_above(self, sizes: Sizes) -> Iterator[Sizes]:
        """Each free size one step larger, the width first, which matters to all."""
        layers = dict(sizes.layers)
        heads, neurons, hidden = self._widths()
        step = sizes.heads if self._split else _step(hidden)
        if "hidden" in self._free and sizes.hidden + step <= hidden:
            yield self._sized(layers, sizes.heads, sizes.neurons, sizes.hidden + step)
        more = sizes.heads + self._head_steps
        if "heads" in self._free and more <= heads:
            yield self._sized(layers, more, sizes.neurons, sizes.hidden)
        if "neurons" in self._free and sizes.neurons + _step(neurons) <= neurons:
            yield self._sized(layers, sizes.heads, sizes.neurons + _step(neurons), sizes.hidden)

    def fits(self, sizes: Sizes) -> bool:
        return not (self._split and sizes.hidden % sizes.heads)

    def _widths(self) -> tuple[int, int, int]:
        return self._sizes.heads, self._sizes.neurons, self._sizes.hidden

    def _steps(self) -> Iterator[tuple[int, int]]:
        heads, neurons, hidden = self._widths()
        known = {
            "layers": [(number, 1) for number in self._sizes.layers.values()],
            "heads": [(heads, self._head_steps)],
            "neurons": [(neurons, _step(neurons))],
            "hidden": [(hidden, 1 if self._split else _step(hidden))],
        }
        for name in self._free:
            yield from known[name]

    def _sized(self, layers: Mapping[Stack, int], heads: int, neurons: int, hidden: int) -> Sizes:
        groups = heads // self._groups_of if self._groups_of else self._sizes.groups
        return Sizes(layers, heads, groups, neurons, hidden)


def _step(number: int) -> int:
    return min(64, 2 ** max(0, (number // _STEPS).bit_length() - 1))


def _down(number: int, share: float, step: int) -> int:
    """``share`` of a number, down to a multiple of ``step``; one step at least."""
    return max(step, int(number * share + 1e-9) // step * step)


def _check(config: Any, family: Family, whole: Sizes, sizes: Sizes, where: str) -> None:
    if sizes.hidden != whole.hidden and config.model_type in family.keeps_hidden:
        raise ConfigError(
            f"{where}: a {config.model_type} multiplies its embeddings, which are its head too, by its width, so that "
            "another width would change what they mean. Cut it along layers, heads and neurons (`along`), and remove "
            "`hidden`."
        )
    layers = sizes.layers
    if "encoder" in layers and layers["decoder"] > layers["encoder"]:
        raise ConfigError(
            f"{where}.layers: {layers['decoder']} layers in the decoder and {layers['encoder']} in the encoder: "
            "transformers cannot write with a T5 whose decoder is the deeper one. Keep as many of the encoder."
        )
    cut_config(config, sizes, first_layers(sizes), where)
