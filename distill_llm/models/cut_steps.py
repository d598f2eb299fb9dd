"""Sizes on the way from a model to what is to become of it, for cuts with training between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from distill_llm.core.errors import ConfigError
from distill_llm.models.anatomy import Sizes, family_of
from distill_llm.models.cut_sizes import cut_config, first_layers, sizes_after
from distill_llm.models.cut_spec import Cut, LayersOfEach

Spacing = Literal["geometric", "linear"]


def steps_to(config: Any, cut: Cut, number: int, spacing: Spacing, where: str) -> list[Cut]:
    """So many cuts, each of the model that the one before left, of which the last comes to the sizes of ``cut``.

    Each size goes down in equal ratios, or by equal numbers, rounded to what a model can have.
    """
    family, last = family_of(config, where), sizes_after(config, cut, where)
    whole = family.sizes_of(config)
    found, before = [], whole
    for place in range(1, number):
        between = _Between(whole, last, before, place / number, spacing)
        before = between.sizes(splits=config.model_type in family.splits_hidden)
        found.append(_as_cut(before, cut))
    return [*found, _as_cut(last, cut)]


def check_steps(config: Any, cut: Cut, steps: Sequence[Cut], where: str) -> None:
    """Raises ConfigError where a step cannot be made of what the one before left, or the last is not ``cut``."""
    family, begun = family_of(config, where), config
    sizes = family.sizes_of(config)
    for number, step in enumerate(steps, start=1):
        sizes = sizes_after(begun, step, f"{where} {number}")
        begun = cut_config(begun, sizes, first_layers(sizes), f"{where} {number}")
    wanted = sizes_after(config, cut, "student.cut")
    if sizes != wanted:
        raise ConfigError(
            f"{where}: the last step leaves {sizes}, but student.cut asks for {wanted}, which is what controls start "
            "from. Let the last step name these sizes, or leave `steps` out."
        )


class _Between:
    """Sizes at a share of the way from ``whole`` to ``last``, none above ``before``."""

    def __init__(self, whole: Sizes, last: Sizes, before: Sizes, share: float, spacing: Spacing):
        self._whole, self._last, self._before = whole, last, before
        self._share, self._spacing = share, spacing

    def sizes(self, *, splits: bool) -> Sizes:
        layers = {stack: self._at(there, self._last.layers[stack]) for stack, there in self._whole.layers.items()}
        heads, groups = self._heads()
        hidden = self._at(self._whole.hidden, self._last.hidden)
        if splits:
            hidden = self._multiple(hidden, heads)
        neurons = self._at(self._whole.neurons, self._last.neurons)
        return Sizes(layers, heads, groups, neurons, hidden)

    def _at(self, there: int, to: int) -> int:
        share = self._share
        exact = there ** (1 - share) * to**share if self._spacing == "geometric" else there + (to - there) * share
        return max(to, min(there, round(exact)))

    def _heads(self) -> tuple[int, int]:
        whole, last = self._whole, self._last
        if last.groups < whole.groups or whole.groups == whole.heads:
            groups = self._at(whole.groups, last.groups)
            return groups * (whole.heads // whole.groups), groups
        if whole.groups == 1:
            return self._at(whole.heads, last.heads), 1
        return whole.heads, whole.groups  # out of several groups at once, in the last step: a number could mean both

    def _multiple(self, hidden: int, heads: int) -> int:
        """The multiple of ``heads`` that is nearest to ``hidden``, where there is one."""
        known = [one for one in range(self._last.hidden, self._before.hidden + 1) if one % heads == 0]
        return min(known, key=lambda one: abs(one - hidden), default=hidden)


def _as_cut(sizes: Sizes, cut: Cut) -> Cut:
    layers = dict(sizes.layers)
    return Cut(
        layers=LayersOfEach(**layers) if len(layers) > 1 else layers["decoder"],
        heads=sizes.heads,
        neurons=sizes.neurons,
        hidden=sizes.hidden,
        by=cut.by,
        layer_importance=cut.layer_importance,
        calibration_rows=cut.calibration_rows,
    )
