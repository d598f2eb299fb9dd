"""What the DistillationTrainer of TRL can do of a recipe: the rest is refused, with the reason, before it is called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from distill_llm.core.errors import ConfigError
from distill_llm.core.extras import need
from distill_llm.core.schedule import Schedule
from distill_llm.losses.forward_kl import ForwardKL
from distill_llm.losses.jensen_shannon import JensenShannon
from distill_llm.losses.reverse_kl import ReverseKL
from distill_llm.teachers.frozen import Frozen

if TYPE_CHECKING:
    from distill_llm.losses.base import TermLoss
    from distill_llm.objective import Term

_HERE = "Change it, or set scheme.engine: trainer"


def mixture_of(loss: TermLoss) -> float | None:
    """The share (beta) with which TRL's divergence is this loss; None where it is none of them."""
    if isinstance(loss, JensenShannon):
        return loss.mixture
    return {ForwardKL: 0.0, ReverseKL: 1.0}.get(type(loss))


def check_for_trl(recipe: Any) -> None:
    """Raises ValueError where ``recipe``, a Recipe, asks what TRL's trainer has no place for. Reads no file."""
    found = next(_refusals(recipe), None)
    if found is not None:
        where, reason = found
        raise ValueError(f"{where}: scheme.engine: trl {reason}. {_HERE}")


def check_installed(recipe: Any) -> None:
    """Raises ConfigError where TRL, or vLLM for its writing, is not installed, or the student is not decoder-only."""
    need("trl", "trl", where="scheme.engine: trl")
    if recipe.scheme.vllm is not None:
        need("vllm", "vllm", where="scheme.vllm")
    student = recipe.student
    if student.config:
        from transformers import CONFIG_MAPPING

        is_pair = CONFIG_MAPPING[student.config["model_type"]]().is_encoder_decoder
    else:
        from distill_llm.models.load import read_config

        is_pair = read_config(student.model, student.revision, where="student.model").is_encoder_decoder
    if is_pair:
        raise ConfigError(
            "student: scheme.engine: trl trains decoder-only students, and this is an encoder-decoder. Choose another, "
            "or set scheme.engine: trainer, which trains both."
        )


def _refusals(recipe: Any) -> Iterator[tuple[str, str]]:
    """Where the recipe asks too much, and why that is so."""
    if len(recipe.objective) > 1:
        names = [term.name for term in recipe.objective]
        yield "objective", f"knows one divergence and nothing beside it, and there are {len(names)} terms, {names}"
    yield from _refused_of_term(recipe.objective[0], recipe)
    yield from _refused_of_scheme(recipe)
    train = recipe.train
    asked = {
        "train.tokens_per_batch": (train.tokens_per_batch > 0, "cuts micro-batches by rows alone"),
        "train.packing": (train.packing == "always", "pads its rows"),
        "train.chunk_tokens": (train.chunk_tokens != "auto", "chooses its chunks itself"),
        "evaluate.ablations": (bool(recipe.evaluate.ablations), "has one term, of which nothing can be left out"),
    }
    yield from ((where, reason) for where, (refused, reason) in asked.items() if refused)


def _refused_of_term(term: Term, recipe: Any) -> Iterator[tuple[str, str]]:
    where = f"objective.{term.name}"
    temperature = getattr(term.loss, "temperature", 1.0)
    asked = {
        "loss": (mixture_of(term.loss) is None, "knows forward_kl, reverse_kl and jensen_shannon alone"),
        "loss.temperature": (
            isinstance(temperature, Schedule) or temperature != recipe.scheme.temperature,
            "has one temperature, a number, for writing (scheme.temperature) and for the divergence",
        ),
        "weight": (isinstance(term.weight, Schedule), "has one term, whose weight stays"),
        "until": (term.until < 1, "asks its teacher to the end"),
        "row_weight": (term.row_weight != "equal", "counts all rows alike"),
    }
    yield from ((f"{where}.{key}", reason) for key, (refused, reason) in asked.items() if refused)
    teacher = recipe.teachers.get(term.teacher)
    if not isinstance(teacher, Frozen):
        yield f"{where}.teacher", "has one teacher, a model of `kind: frozen`"
    elif teacher.own_view() is not None:
        yield f"teachers.{term.teacher}.view", "shows its teacher what the student reads, and nothing else"
    elif teacher.device != "auto":
        yield f"teachers.{term.teacher}.device", "keeps the teacher where the student is"


def _refused_of_scheme(recipe: Any) -> Iterator[tuple[str, str]]:
    scheme = recipe.scheme
    if scheme.student_fraction != 1:
        yield "scheme.student_fraction", "has the student write all texts: the share is 1"
    if scheme.temperature == 0:
        yield "scheme.temperature", "draws what it writes: the temperature is above 0"
    if scheme.targets and set(scheme.targets) != set(recipe.objective[0].targets):
        yield "scheme.targets", f"writes all rows of its term, {list(recipe.objective[0].targets)}"
