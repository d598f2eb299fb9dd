"""transformers' exporters, which turn a model's graphs into another runtime's programs."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from distill_llm.core.errors import DistillError, ExportError
from distill_llm.export.base import Answering, Format, Writer, save_words
from distill_llm.export.graph_writer import GraphWriter, Runner, save_facts

if TYPE_CHECKING:
    from distill_llm.models.load import LoadedModel


PACKAGE = "transformers.exporters"


def exporters() -> Any:
    """The module of transformers that has them; it is young, and its names are not declared."""
    return importlib.import_module(PACKAGE)


class GraphFormat(Format):
    """A student as graphs, each in a file of its own, with a loop around them."""

    suffix: ClassVar[str] = ""
    """Of the files that are opened."""

    def why_not(self, model: Any, tokenizer: Any) -> str:
        from distill_llm.models.graphs import why_no_graphs

        return why_no_graphs(model)

    def open(self, folder: Path, answering: Answering) -> Writer:
        paths = sorted(folder.glob(f"*{self.suffix}"))
        return GraphWriter({path.stem: self.runner(path, answering.threads) for path in paths}, folder, answering)

    @abstractmethod
    def runner(self, path: Path, threads: int) -> Runner:
        """One graph in the runtime, with so many threads."""


def write_graphs(
    student: LoadedModel, exporter: type[Any], config: Callable[..., Any], folder: Path, *, where: str
) -> None:
    """Writes a student's graphs into ``folder``, each as its name and the exporter's suffix, and what a loop around
    them has to know. ``config`` makes the exporter's of free axes.

    Raises ExportError with the exporter's reason where it cannot trace the model.
    """
    from distill_llm.models.graphs import graphs_of

    graphs = graphs_of(student.model)
    save_words(student, folder)
    save_facts(student, graphs, folder)
    for name, graph in graphs.items():
        try:
            with _quiet():
                settings = config(dynamic_shapes=graph.free)
                program, _ = exporter().export_program(graph.module.eval(), graph.inputs, settings)
                exporter.save_program(_without_traces(program), folder / f"{name}{exporter.program_suffix}")
        except (DistillError, OSError):
            raise
        except Exception as error:  # whatever a tracer raises
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ExportError(
                f"{where}: {exporter.__name__} cannot trace the {name}: {reason} Export the model as safetensors, "
                "which works for all."
            ) from error


def _without_traces(program: Any) -> Any:
    """Of an ONNX graph: without the lines of Python that each node came from, which are most of a small file."""
    for graph in program.graphs() if hasattr(program, "graphs") else ():
        for node in graph:
            node.metadata_props.clear()
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of what exporters print about experiments, stages and operators that are not there; errors are raised."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
