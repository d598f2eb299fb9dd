"""Integer weights through torchao, which transformers reads wherever torchao is installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from distill_llm.core.errors import ConfigError
from distill_llm.export.base import Answering, Format, Writer, save_words
from distill_llm.export.in_torch import written_from
from distill_llm.models.quantize import QuantizeSpec, find_layers, quantized, save_quantized

if TYPE_CHECKING:
    from distill_llm.models.load import LoadedModel

_GROUPS = (32, 16, 8)


class TorchAo(Format):
    """Linear layers and embeddings in integers, quantized after training: int8 a row with activations as they are, int4
    in groups with activations of 8 bits."""

    packages = ("torchao",)
    extra: ClassVar[str] = "quantize"
    runtime: ClassVar[str] = "transformers with torchao"
    weights = ("*.safetensors",)
    kind: Literal["torchao"] = "torchao"
    variant: Literal["int8", "int4"] = "int8"

    def why_not(self, model: Any, tokenizer: Any) -> str:
        try:
            find_layers(model, self._spec(model), where="quantize")
        except ConfigError as error:
            return str(error).removesuffix(".")
        return ""

    def write(self, student: LoadedModel, folder: Path) -> None:
        import copy

        save_words(student, folder)
        # Of a copy, as quantizing changes a model in place.
        save_quantized(quantized(copy.deepcopy(student.model), self._spec(student.model), where=self.name), folder)

    def open(self, folder: Path, answering: Answering) -> Writer:
        return written_from(folder, answering)

    def _spec(self, model: Any) -> QuantizeSpec:
        """int4 in the largest groups that fit all layers, embeddings in int8 where they are a plain matrix."""
        from torch import nn

        widths = {part.in_features for part in model.modules() if type(part) is nn.Linear}
        fits = [size for size in _GROUPS if not any(width % size for width in widths)]
        plain = type(model.get_input_embeddings()) is nn.Embedding
        return QuantizeSpec(
            weights=self.variant,
            activations="int8" if self.variant == "int4" else "full",
            group_size=fits[0] if fits and self.variant == "int4" else "row",
            embeddings="int8" if plain else "full",
        )
