"""Step-by-step distillation of language models: rationales, a small student, and a scorecard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill_llm.pipeline.run import cache_signals, evaluate, generate_rationales, run, student_trainer, train
    from distill_llm.pipeline.sweep import sweep
    from distill_llm.recipe.load import load_recipe
    from distill_llm.training.trainer import DistillTrainer

__version__ = "0.1.0"
__all__ = [
    "DistillTrainer",
    "__version__",
    "cache_signals",
    "evaluate",
    "generate_rationales",
    "load_recipe",
    "run",
    "student_trainer",
    "sweep",
    "train",
]

_HOME = {
    "load_recipe": "distill_llm.recipe.load",
    "cache_signals": "distill_llm.pipeline.run",
    "generate_rationales": "distill_llm.pipeline.run",
    "train": "distill_llm.pipeline.run",
    "evaluate": "distill_llm.pipeline.run",
    "run": "distill_llm.pipeline.run",
    "student_trainer": "distill_llm.pipeline.run",
    "sweep": "distill_llm.pipeline.sweep",
    "DistillTrainer": "distill_llm.training.trainer",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that ``import distill_llm`` costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'distill_llm' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
