"""The text teacher `transformers` against plain loops over `model.generate`: the same weights, prompts and texts.

python benchmarks/generation.py [--data DATA] [--examples 200] [--batch-rows 32] [--repeats 3] [--device cpu]

The models have random weights, so that no text ends by itself: each row writes all its new tokens, and what dropping
rows that have ended saves is not seen here. All prompts begin with the exemplars of data/exemplars/gsm8k.yaml.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from distill_llm.models.load import build_student, load_tokenizer
from distill_llm.models.spec import StudentSpec
from distill_llm.rationales.prompts import make_prompter
from distill_llm.tasks.gsm8k import Gsm8k
from distill_llm.teachers.base import Completion, Request, Sampling
from distill_llm.teachers.prompt import PromptSpec
from distill_llm.teachers.transformers import Transformers

MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "max_position_embeddings": 4096,
    },
    "t5": {"d_model": 160, "d_kv": 32, "d_ff": 512, "num_layers": 4, "num_heads": 5, "feed_forward_proj": "relu"},
}
ENGINE = "this teacher"


@dataclass(frozen=True)
class Case:
    """One model, and how it is asked."""

    model: str
    folder: Path
    requests: list[Request]
    sampling: Sampling
    batch_rows: int
    device: str


def make_model(kind: str, prompts: Sequence[str], folder: Path) -> int:
    """Saves a model with random weights and a tokenizer of the prompts; its number of parameters."""
    config = {"model_type": kind, **MODELS[kind]}
    spec = StudentSpec.model_validate({"config": config, "tokenizer": {"kind": "bytes_bpe", "vocab_size": 4096}})
    torch.manual_seed(0)
    made = build_student(spec, load_tokenizer(spec, prompts))
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return made.num_parameters


def open_teacher(case: Case) -> Callable[[], list[str]]:
    spec = Transformers(model=str(case.folder), batch_rows=case.batch_rows, device=case.device, batching="static")
    spec.check(chat=False, sampling=case.sampling)
    teacher = spec.open(task=Gsm8k(), sampling=case.sampling, seed=0)

    def write() -> list[str]:
        found = {request.key: answer for request, answer in teacher.complete(case.requests)}
        answers = [found[request.key] for request in case.requests]
        assert all(isinstance(answer, Completion) for answer in answers)
        return [answer.text for answer in answers if isinstance(answer, Completion)]

    return write


def open_plain_loop(case: Case, rows: int) -> Callable[[], list[str]]:
    """What one writes by hand: prompts in the order of the data, padded on the left, `rows` at a time."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    auto: Any = AutoModelForSeq2SeqLM if case.model == "t5" else AutoModelForCausalLM
    model = auto.from_pretrained(case.folder).to(case.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(case.folder, padding_side="right" if case.model == "t5" else "left")
    prompts = [str(request.prompt) for request in case.requests]
    options: dict[str, Any] = {
        "max_new_tokens": case.sampling.max_new_tokens,
        "do_sample": case.sampling.temperature > 0,
        "eos_token_id": [tokenizer.eos_token_id, tokenizer.pad_token_id],
        "pad_token_id": tokenizer.pad_token_id,
    }

    def write() -> list[str]:
        texts: list[str] = []
        for start in range(0, len(prompts), rows):
            inputs = tokenizer(prompts[start : start + rows], padding=True, return_tensors="pt").to(model.device)
            with torch.inference_mode():
                out = model.generate(**inputs, **options)
            new = out[:, 1:] if case.model == "t5" else out[:, inputs["input_ids"].size(1) :]
            texts += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
        return texts

    return write


def measure(name: str, case: Case, loops: Sequence[int], repeats: int, table: Table) -> None:
    """Adds a row for each way of writing. They take turns, and greedy texts must be the same."""
    ways = {ENGINE: open_teacher(case)}
    ways |= {"one row at a time" if rows == 1 else "same batches": open_plain_loop(case, rows) for rows in loops}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    texts: dict[str, list[str]] = {}
    few = Case(case.model, case.folder, case.requests[:2], case.sampling, case.batch_rows, case.device)
    open_teacher(few)()  # threads, allocators and kernels are warm when the clock starts
    for repeat in range(repeats + 1):
        for way, write in ways.items():
            if repeat == 0 and way != ENGINE:
                continue  # the teacher loads its weights at the first question; the loops have theirs
            began = time.perf_counter()
            texts[way] = write()
            if repeat:
                seconds[way].append(time.perf_counter() - began)
    if case.sampling.temperature == 0:
        for way, found in texts.items():
            different = sum(a != b for a, b in zip(texts[ENGINE], found, strict=True))
            assert different == 0, f"{name}: {different} of {len(found)} greedy texts differ between {ENGINE} and {way}"
    for way, spent in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(spent, seconds[ENGINE], strict=True)]
        speed = len(case.requests) / median(spent)
        spread = f"{median(ratios):.1f} ({min(ratios):.1f} .. {max(ratios):.1f})"
        table.add_row(name, way, f"{median(spent):.1f}", f"{speed:.2f}", "" if way == ENGINE else spread)


def make_requests(prompts: Sequence[str], examples: Sequence[Any], samples: int) -> list[Request]:
    return [
        Request(f"{number:08x}{sample:08x}", example, "train", sample, prompt)
        for number, (prompt, example) in enumerate(zip(prompts, examples, strict=True))
        for sample in range(samples)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", default="openai/gsm8k", help="Hub id, or a folder with train.jsonl")
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--batch-rows", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cases", nargs="+", default=["llama", "llama-batches", "sampled", "t5"])
    given = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(given.threads)
    examples = Gsm8k(data=given.data).read()["train"][: given.examples]
    prompter = make_prompter(PromptSpec(exemplars="gsm8k"))
    prompts = [str(prompter.render(example)) for example in examples]
    greedy = Sampling(max_new_tokens=given.max_new_tokens)
    drawn = Sampling(max_new_tokens=given.max_new_tokens, temperature=0.7)
    table = Table("case", "way", "seconds", "completions/s", "this teacher is faster by (range)", box=None)
    with tempfile.TemporaryDirectory() as place:
        sizes = {kind: make_model(kind, prompts, Path(place) / kind) for kind in MODELS}

        def run(name: str, kind: str, sampling: Sampling, samples: int, loops: Sequence[int]) -> None:
            some = slice(0, max(2, 2 * len(prompts) // (samples + 1)))  # n samples of fewer prompts take about as long
            requests = make_requests(prompts[some], examples[some], samples)
            case = Case(kind, Path(place) / kind, requests, sampling, given.batch_rows, given.device)
            measure(f"{name}, {sizes[kind]:,} parameters", case, loops, given.repeats, table)

        both = (1, given.batch_rows)
        cases: dict[str, Callable[[], None]] = {
            "llama": lambda: run("llama, greedy", "llama", greedy, 1, both),
            "llama-batches": lambda: run("llama, greedy", "llama", greedy, 1, both[1:]),
            "sampled": lambda: run("llama, 4 samples", "llama", drawn, 4, both[1:]),
            "t5": lambda: run("t5, greedy", "t5", greedy, 1, both),
        }
        for case in given.cases:
            cases[case]()
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
