"""OpenVINO's intermediate representation, for Intel's processors."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from distill_llm.export.exporters import PACKAGE, GraphFormat, exporters, write_graphs
from distill_llm.export.graph_writer import Runner, inputs_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distill_llm.models.load import LoadedModel


class OpenVino(GraphFormat):
    """Graphs with a cache of keys and values; in float16 the weights on disk are half as large."""

    packages = ("openvino", PACKAGE)
    runtime: ClassVar[str] = "OpenVINO"
    weights = ("*.xml", "*.bin")
    suffix = ".xml"
    kind: Literal["openvino"] = "openvino"
    variant: Literal["float32", "float16"] = "float32"

    def write(self, student: LoadedModel, folder: Path) -> None:
        of = exporters()
        # Keys and values stay inputs and outputs: rows of a batch that have ended can be dropped.
        config = partial(of.OpenVINOConfig, stateful=False, compress_to_fp16=self.variant == "float16")
        write_graphs(student, of.OpenVINOExporter, config, folder, where=f"format {self.name}")

    def runner(self, path: Path, threads: int) -> Runner:
        return _Compiled(path, threads)


class _Compiled:
    def __init__(self, path: Path, threads: int):
        import openvino

        # Where the processor has bfloat16, OpenVINO would compute in it unasked, and answers would differ.
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        compiled = openvino.Core().compile_model(str(path), "CPU", options)
        self._request = compiled.create_infer_request()
        self._inputs = [one.any_name for one in compiled.inputs]
        self._outputs = [one.any_name for one in compiled.outputs]

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found: Any = self._request.infer(inputs_of(self._inputs, inputs))
        return {name: found[name] for name in self._outputs}
