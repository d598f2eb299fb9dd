"""ONNX graphs for ONNX Runtime: on servers, phones and in browsers."""

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


class Onnx(GraphFormat):
    """Graphs with a cache of keys and values; in int8 with weights of 8 bits, activations quantized as they come."""

    packages = ("onnx", "onnxscript", "onnxruntime", PACKAGE)
    runtime: ClassVar[str] = "ONNX Runtime"
    weights = ("*.onnx", "*.onnx.data")
    suffix = ".onnx"
    kind: Literal["onnx"] = "onnx"
    variant: Literal["float32", "int8"] = "float32"

    def write(self, student: LoadedModel, folder: Path) -> None:
        of = exporters()
        quantizer = of.OnnxRuntimeQuantizer(of.OnnxRuntimeDynamicConfig()) if self.variant == "int8" else None
        config = partial(of.OnnxConfig, quantizer=quantizer)
        write_graphs(student, of.OnnxExporter, config, folder, where=f"format {self.name}")

    def runner(self, path: Path, threads: int) -> Runner:
        return _Session(path, threads)


class _Session:
    def __init__(self, path: Path, threads: int):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._inputs = [one.name for one in self._session.get_inputs()]
        self._outputs = [one.name for one in self._session.get_outputs()]

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found: Any = self._session.run(self._outputs, inputs_of(self._inputs, inputs))
        return dict(zip(self._outputs, found, strict=True))
