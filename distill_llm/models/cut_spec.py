"""The recipe's side of a cut: how much of a larger model a student is made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill_llm.core.component import Component

Dimension = Literal["layers", "heads", "neurons", "hidden"]
Choice = Literal["importance", "first", "last", "spread"]
Layers = Annotated[int, Field(ge=0)] | tuple[Annotated[int, Field(ge=0)], ...]
"""A number, 0 for all; or which ones, counted from 0."""


class LayersOfEach(Component):
    """Layers of an encoder-decoder's two stacks, each as one stack is given; 0 for all of them."""

    encoder: Layers = 0
    decoder: Layers = 0


class Cut(Component):
    """A smaller model, made of a part of the weights of `model`. What is not named, and in no target, stays whole."""

    ratio: float = Field(
        default=0.0, ge=0, le=1, description="share of the parameters that may stay, as a target; 0: the sizes say"
    )
    parameters: int = Field(default=0, ge=0, description="parameters that may stay, as a target; 0: the sizes say")
    along: tuple[Dimension, ...] = Field(
        default=("heads", "neurons", "hidden"),
        min_length=1,
        description="what a target is reached by: each of these, where it is not given, in about the same ratio",
    )
    layers: Layers | LayersOfEach = Field(
        default=0, description="how many stay, or which (counted from 0), of each stack; 0: all"
    )
    heads: int = Field(default=0, ge=0, description="attention heads (query heads) of a layer; 0: all")
    neurons: int = Field(default=0, ge=0, description="width of the feed-forward layers; 0: all")
    hidden: int = Field(default=0, ge=0, description="width of the model; 0: all")
    by: Choice = Field(
        default="importance",
        description="which ones stay. importance: measured on training rows; spread: evenly, the first and the last "
        "among them; first, last: without a measurement",
    )
    layer_importance: Literal["block_influence", "loss"] = Field(
        default="block_influence",
        description="of layers. block_influence: by how much a layer turns its input (1 - cosine); loss: by how much "
        "the loss grows without it, one pass for each layer",
    )
    calibration_rows: int = Field(default=256, gt=0, description="training rows on which importance is measured")

    @model_validator(mode="after")
    def _says_something(self) -> Cut:
        if self.ratio and self.parameters:
            raise ValueError("give either `ratio` or `parameters` as the target, not both")
        if not (self.ratio or self.parameters or self.given):
            raise ValueError(
                "nothing is cut: give a target (`ratio` or `parameters`), or sizes (`layers`, `heads`, `neurons`, "
                "`hidden`)"
            )
        if self.has_target and not self.free:
            raise ValueError(
                f"`along` names {list(self.along)}, all of which are given: nothing is left by which the target could "
                "be reached. Name another, or remove the target"
            )
        for layers in self.lists:
            if not layers or list(layers) != sorted(set(layers)):
                raise ValueError(f"`layers`: name each layer once, in order: {sorted(set(layers)) or [0]}")
        return self

    @property
    def has_target(self) -> bool:
        return bool(self.ratio or self.parameters)

    @property
    def given(self) -> tuple[Dimension, ...]:
        """What has a size, or a list, of its own."""
        layers = (
            self.layers if not isinstance(self.layers, LayersOfEach) else self.layers.encoder or self.layers.decoder
        )
        sizes: dict[Dimension, object] = {
            "layers": layers != 0,
            "heads": self.heads,
            "neurons": self.neurons,
            "hidden": self.hidden,
        }
        return tuple(name for name, size in sizes.items() if size)

    @property
    def free(self) -> tuple[Dimension, ...]:
        """What a target is reached by."""
        return tuple(name for name in self.along if name not in self.given)

    @property
    def lists(self) -> tuple[tuple[int, ...], ...]:
        """Layers that are given one by one, of each stack."""
        each = (self.layers.encoder, self.layers.decoder) if isinstance(self.layers, LayersOfEach) else (self.layers,)
        return tuple(layers for layers in each if not isinstance(layers, int))

    @property
    def measures(self) -> bool:
        """Whether it has to be seen on data what stays."""
        return self.by == "importance"
