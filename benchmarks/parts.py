"""A step's time and memory by the size of the parts in which an encoder-decoder reads a batch.

    python benchmarks/parts.py [KEY=VALUE]... [--tokens 2048 4096 8192 16384 32768 65536] [--rounds 3]

Rows, model and trainer are those of benchmarks/training.py, whose recipe KEY=VALUE overrides: forward, backward and the
optimiser's step, the sizes in turn, round after round; shown are medians. A step should be one large micro-batch:
`train.rows_per_batch` as large as `train.rows_per_step`. `core/layout.py` has the size that was chosen.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from training import Way, our_trainer, prepare, seconds_a_step
from transformers import Trainer

from distill_llm.core.quiet import quiet_libraries


def trainer_with(part_tokens: int, way: Way, **options: Any) -> Trainer:
    trainer: Any = our_trainer(way, **options)
    trainer.collator = replace(trainer.collator, part_tokens=part_tokens)
    return trainer


def measure(make: Callable[..., Trainer], way: Way, given: argparse.Namespace, seed: int) -> tuple[float, float]:
    """Seconds a step, and the most memory that was taken on the GPU, in GiB (0 on a CPU)."""
    if not torch.cuda.is_available():
        return seconds_a_step(make, way, given, seed), 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return seconds_a_step(make, way, given, seed), torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe; before the options")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="timed in each block")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: this process's, of all threads")
    given = parser.parse_args()
    quiet_libraries()
    found: dict[int, list[tuple[float, float]]] = {size: [] for size in given.tokens}
    with tempfile.TemporaryDirectory() as folder:
        way = prepare("parts", given.overrides, Path(folder))
        for seed in range(given.rounds + 1):
            for size, results in found.items():
                result = measure(partial(trainer_with, size), way, given, seed)
                if seed:  # the first round pays for cold caches
                    results.append(result)
    examples = way.recipe.train.rows_per_step // 2
    print("\n| tokens of a part | seconds a step | examples/s | peak GiB |\n|---:|---:|---:|---:|")
    for size, results in found.items():
        seconds, peak = (median(one) for one in zip(*results, strict=True))
        print(f"| {size:,} | {seconds:.4g} | {examples / seconds:.0f} | {peak:.2f} |")


if __name__ == "__main__":
    main()
