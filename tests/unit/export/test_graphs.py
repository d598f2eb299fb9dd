"""Models cut into graphs, and the loop around them: the same texts as transformers' own generation. Here torch runs the
graphs; tests/integration/test_export.py has them traced and run by other runtimes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from distill_llm.core.errors import ExportError
from distill_llm.export.base import Answering, save_words
from distill_llm.export.graph_writer import GraphWriter, save_facts
from distill_llm.models.fresh import weightless
from distill_llm.models.generate import Generator
from distill_llm.models.graphs import Graph, graphs_of, why_no_graphs
from tests.conftest import build_tiny

if TYPE_CHECKING:
    from distill_llm.models.load import LoadedModel

TEXTS = ["who pays more ?", "what costs 3 + 4 ? because ann bob", "a", "reason : explain the answer is 1 2 3 4 5 6 7"]
BART = {
    "model_type": "bart",
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "init_std": 1.0,
}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 4, "initializer_range": 1.0}
MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 4,
}


class InTorch:
    """Runs a graph's module on arrays whose names have points where the module's inputs are nested."""

    def __init__(self, graph: Graph):
        self.graph, self.rows = graph, []

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        nested: dict[str, Any] = {}
        for name, value in inputs.items():
            *path, last = name.split(".")
            place = nested
            for key in path:
                place = place.setdefault(key, {})
            place[last] = torch.from_numpy(np.ascontiguousarray(value))
        self.rows.append(len(next(iter(inputs.values()))))
        with torch.no_grad():
            out = self.graph.module(**{name: nested[name] for name in self.graph.inputs})
        return dict(_flat(out))


def _flat(value: Any, path: str = "") -> Any:
    if isinstance(value, torch.Tensor):
        yield path, value.numpy()
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{path}.{key}" if path else key)


def _loop(student: LoadedModel, folder: Path, answering: Answering) -> tuple[GraphWriter, dict[str, InTorch]]:
    graphs = graphs_of(student.model)
    save_words(student, folder)
    save_facts(student, graphs, folder)
    runners = {name: InTorch(graph) for name, graph in graphs.items()}
    return GraphWriter(runners, folder, answering), runners


@pytest.mark.parametrize(
    ("family", "prefix"), [("t5", ()), ("t5", (5, 6)), ("bart", ()), ("bart", (5, 6)), ("llama", ()), ("gpt2", ())]
)
def test_the_loop_writes_what_transformers_writes(
    family: str,
    prefix: tuple[int, ...],
    tiny_t5: Callable[..., LoadedModel],
    tiny_llama: Callable[..., LoadedModel],
    tmp_path: Path,
) -> None:
    made = {
        "t5": lambda: tiny_t5(num_layers=2, initializer_factor=8.0),
        "llama": lambda: tiny_llama(num_hidden_layers=2, initializer_range=1.0),
        "bart": lambda: build_tiny(BART),
        "gpt2": lambda: build_tiny(GPT2),
    }
    student = made[family]()
    prompts = [student.tokenizer(text)["input_ids"] for text in TEXTS]
    expected = Generator(student.model, student.tokenizer, max_new_tokens=12, decoder_prefix=prefix).write_ids(prompts)
    writer, _ = _loop(student, tmp_path, Answering(12, prefix, 1))
    assert len({one.ids for one in expected}) > 2, "texts that say nothing of the prompt would prove nothing"
    assert writer.write_ids(prompts) == expected
    assert [writer.write_ids([prompt])[0] for prompt in prompts] == expected


def test_rows_that_have_ended_are_dropped(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    student = tiny_t5(num_layers=2, initializer_factor=8.0)
    prompts = [student.tokenizer(text)["input_ids"] for text in TEXTS]
    long = Generator(student.model, student.tokenizer, max_new_tokens=12).write_ids(prompts)
    end = long[1].ids[2]  # what one row writes early becomes an end token
    assert any(end not in one.ids[:6] for one in long)
    student.model.generation_config.eos_token_id = [student.tokenizer.eos_token_id, end]
    writer, runners = _loop(student, tmp_path, Answering(12, (), 1))
    assert writer.write_ids(prompts) == Generator(student.model, student.tokenizer, max_new_tokens=12).write_ids(
        prompts
    )
    assert runners["decoder"].rows[0] == len(prompts) > runners["decoder"].rows[5]


@pytest.mark.parametrize("decoder", ["gpt2", "bert", "trocr"])
def test_the_loop_of_a_model_that_sees(decoder: str, tiny_vision: Callable[..., LoadedModel], tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="needs the extra pictures")
    student = tiny_vision(decoder=decoder)
    for weight in student.model.parameters():
        torch.nn.init.normal_(weight)
    painter = student.painter
    assert painter is not None
    pixels = painter.pixels([painter.picture(text) for text in TEXTS])
    expected = Generator(student.model, student.tokenizer, max_new_tokens=6).write_pictures(pixels)
    writer, _ = _loop(student, tmp_path, Answering(6, (), 1))
    assert writer.write_pictures(pixels) == expected
    assert (tmp_path / "preprocessor_config.json").exists()


def test_what_keeps_more_than_keys_and_values_is_refused(tiny_llama: Callable[..., LoadedModel]) -> None:
    windowed = build_tiny(MISTRAL).model
    assert "a sliding window" in why_no_graphs(weightless(windowed.config))
    with pytest.raises(ExportError, match="plain keys and values of each layer"):
        graphs_of(windowed)
    assert why_no_graphs(weightless(tiny_llama().model.config)) == ""
