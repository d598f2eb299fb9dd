"""Peak memory and time of cross-entropy plus KL over a large vocabulary: all logits at once, and in chunks.

Each measurement is a process of its own, one after the other, the ways in turn. Students and teachers have one small
layer, so that what is measured is the head and the loss: forward, backward, gradients of all weights.

    python benchmarks/memory.py --tokens 1024 [--ways whole chunks divergence trl]

`divergence` is the KL alone, in chunks; `trl` the same by TRL's chunked divergence, where TRL is installed. It need not
be in the same environment: `pip install --no-deps --target /tmp/trl 'trl==1.16.*'`, then PYTHONPATH=/tmp/trl.

On a GPU (`--device cuda`) a whole step comes before those that are measured, as kernels are chosen and compiled in the
first; seconds are the median of some steps, between CUDA events, and the peak is the allocator's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORDS, HIDDEN, ROW_TOKENS = 151_936, 1024, 256  # vocabulary and width of Qwen3-0.6B
COPIES = 16  # of all logits in float32, that the loss over all logits at once needs in its worst moment, generously
WAYS = ("whole", "chunks", "divergence", "trl")
PAIRS = (("whole", "chunks"), ("trl", "divergence"))  # the second is compared with the first
TEMPERATURE = 2.0
GPU_STEPS = 7
BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jensen_shannon": 0.5}  # as TRL tells them apart


def main() -> None:
    """Prints a table of the ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help=f"supervised tokens; a multiple of {ROW_TOKENS}")
    parser.add_argument("--words", type=int, default=WORDS, help="entries of the vocabulary")
    parser.add_argument("--chunk-tokens", default="auto", help="tokens of a chunk, or auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--divergence", default="forward_kl", choices=list(BETAS))
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_measure(options)))
        return
    if "trl" in options.ways and importlib.util.find_spec("trl") is None:
        options.ways = [way for way in options.ways if way != "trl"]
        print("trl: skipped, it is not installed", file=sys.stderr)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in options.ways}
    for _ in range(options.repeats):
        for way in options.ways:
            _check_memory(options, way)
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--one", way], check=True, stdout=subprocess.PIPE, text=True
            )
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{way}: {found[way][-1]}", file=sys.stderr)
    _show(options, found)


def _check_memory(options: argparse.Namespace, way: str) -> None:
    if options.device != "cpu" or way != "whole":
        return
    facts = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) for line in facts if line.startswith("MemAvailable")) * 1024
    needed = COPIES * 4 * options.tokens * options.words
    if needed > free:
        sys.exit(
            f"--tokens {options.tokens}: all logits at once may need {needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free. Choose fewer tokens, or `--ways chunks divergence trl`."
        )


def _show(options: argparse.Namespace, found: dict[str, list[dict[str, float]]]) -> None:
    place = options.device
    if place != "cpu":
        import torch

        place = torch.cuda.get_device_name()
    print(
        f"\n{options.tokens} supervised tokens, vocabulary {options.words}, hidden size {HIDDEN}, {options.precision}, "
        f"{place}, {options.divergence}, medians of {options.repeats}\n\n"
        "| way | peak above the models, GiB | seconds | loss |\n"
        "|---|---|---|---|"
    )
    middle = {way: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for way, runs in found.items()}
    for way, values in middle.items():
        print(f"| {way} | {values['peak'] / 2**30:.2f} | {values['seconds']:.3g} | {values['loss']:.6f} |")
    for first, second in PAIRS:
        if {first, second} <= middle.keys():
            peak, seconds = (middle[second][what] / middle[first][what] for what in ("peak", "seconds"))
            print(f"| {second} / {first} | {peak:.3f} | {seconds:.2f} | |")


def _measure(options: argparse.Namespace) -> dict[str, float]:
    """One step of one way: peak bytes above what both models take, seconds, and the loss."""
    import torch

    from distill_llm.data.collate import Collator
    from distill_llm.data.rows import Row

    student, teacher = (_model(options, seed) for seed in (1, 2))
    loss_of = _trl_loss(options, student, teacher) if options.one == "trl" else _our_loss(options, student, teacher)

    def step(rows: int, length: int) -> float:
        words = torch.randint(2, options.words, (rows, length), generator=torch.Generator().manual_seed(3)).tolist()
        batch = Collator(0, None)([Row(index, "rationale", [5], ids) for index, ids in enumerate(words)])
        loss = loss_of({name: column.to(options.device) for name, column in batch.items()})
        loss.backward()
        value = loss.item()
        student.zero_grad(set_to_none=True)
        return value

    step(1, 2)
    if options.device != "cpu":
        return _measure_on_gpu(lambda: step(options.tokens // ROW_TOKENS, ROW_TOKENS))
    before = _peak_bytes(reset=True)
    started = time.perf_counter()
    loss = step(options.tokens // ROW_TOKENS, ROW_TOKENS)
    seconds = time.perf_counter() - started
    return {"peak": _peak_bytes() - before, "seconds": seconds, "loss": loss}


def _measure_on_gpu(step: Callable[[], float]) -> dict[str, float]:
    import torch

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, times, loss = torch.cuda.memory_allocated(), [], 0.0
    for _ in range(GPU_STEPS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        loss = step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return {"peak": torch.cuda.max_memory_allocated() - before, "seconds": statistics.median(times), "loss": loss}


def _our_loss(options: argparse.Namespace, student: Any, big: Any) -> Callable[[Any], Any]:
    from distill_llm.core.component import kinds
    from distill_llm.losses.base import Loss
    from distill_llm.losses.cross_entropy import CrossEntropy
    from distill_llm.models.head import OutputHead
    from distill_llm.objective import Objective, Term
    from distill_llm.schemes.step_by_step import StepByStep
    from distill_llm.teachers.frozen import FrozenTeacher

    teacher = FrozenTeacher(big)
    soft = kinds(Loss, "distill_llm.losses")[options.divergence].model_validate({"temperature": TEMPERATURE})
    terms = [Term(name="soft", loss=soft, targets=("rationale",), teacher="big")]
    if options.one != "divergence":
        terms.insert(0, Term(name="hard", loss=CrossEntropy(), targets=("rationale",)))
    objective = Objective(terms)
    chunk_tokens = "auto" if options.chunk_tokens == "auto" else int(options.chunk_tokens)
    head = OutputHead(student, chunk_tokens=chunk_tokens) if options.one != "whole" else None

    def loss_of(batch: Any) -> Any:
        ((said, taught),) = StepByStep().compare(student, {"big": teacher}, batch, objective, head)
        return objective(said, taught, objective.counts(batch))[0]

    return loss_of


def _trl_loss(options: argparse.Namespace, student: Any, teacher: Any) -> Callable[[Any], Any]:
    """TRL's loss has no factor temperature^2, and adds the student's entropy to its forward pass."""
    import torch
    from trl.kernels.chunked_divergence import (  # pyright: ignore[reportMissingImports]
        ChunkedDivergenceFunction,
    )

    from distill_llm.core.signals import IGNORE_INDEX, aligned_labels, model_inputs

    def hidden(model: Any, batch: Any) -> Any:
        wanted = aligned_labels(batch) != IGNORE_INDEX
        with torch.autocast(options.device, dtype=torch.bfloat16, enabled=options.precision == "bfloat16"):
            return model.model(**model_inputs(batch)).last_hidden_state[:, :-1][wanted]

    def loss_of(batch: Any) -> Any:
        said = hidden(student, batch)
        with torch.no_grad():
            taught = hidden(teacher, batch)
        heads = (student.lm_head.weight, None, taught, teacher.lm_head.weight, None)
        losses, _ = ChunkedDivergenceFunction.apply(said, *heads, BETAS[options.divergence], TEMPERATURE)
        return TEMPERATURE**2 * losses.sum() / len(said)

    return loss_of


def _peak_bytes(*, reset: bool = False) -> int:
    """Most memory so far; with ``reset``: what is taken now, from where a new peak is sought."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux's way to forget the old peak
    facts = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    wanted = "VmRSS" if reset else "VmHWM"
    return next(int(line.split()[1]) for line in facts if line.startswith(wanted)) * 1024


def _model(options: argparse.Namespace, seed: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=options.words,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).float().to(options.device)
    if options.precision == "bfloat16":
        forward = model.forward

        def in_bfloat16(*arguments: Any, **inputs: Any) -> Any:
            with torch.autocast(options.device, dtype=torch.bfloat16):
                return forward(*arguments, **inputs)

        model.forward = in_bfloat16
    return model


if __name__ == "__main__":
    main()
