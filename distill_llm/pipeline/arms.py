"""Arms: every model that a recipe trains, the student, its ablations and its controls, each with its own plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

from distill_llm.core.errors import ConfigError
from distill_llm.core.example import Target
from distill_llm.data.rows import Row
from distill_llm.losses.cross_entropy import CrossEntropy
from distill_llm.objective import Term, targets_of
from distill_llm.recipe.recipe import Recipe

STUDENT = "student"


@dataclass(frozen=True, slots=True)
class Arm:
    """``evaluate_target`` is what it is asked for on validation and test."""

    name: str
    role: Literal["student", "control"]
    description: str
    terms: tuple[Term, ...]
    max_steps: int
    evaluate_target: Target

    @property
    def targets(self) -> tuple[Target, ...]:
        return targets_of(self.terms)

    def rows_of(self, rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if row.target in self.targets]


def needed_targets(recipe: Recipe) -> tuple[Target, ...]:
    """Targets that some arm trains on."""
    controls = (_label_term(),) if recipe.evaluate.controls else ()
    return targets_of([*recipe.objective, *controls])


def plan_arms(
    recipe: Recipe, rows: Sequence[Row], *, student_parameters: int, teacher_parameters: Mapping[str, int]
) -> list[Arm]:
    """The student first, then ablations (objectives with fewer terms), then controls (labels only).

    The control with the same compute gets as many steps as the student's cost pays for, where a row costs
    6 * student parameters * its tokens, plus, for each teacher that is run on it, 2 * teacher parameters * the tokens
    that this teacher reads (Kaplan et al. 2020, arXiv:2001.08361, sec. 2.1), and 2 * student parameters * its tokens
    for each time that the scheme has the student read it besides. One that is cached runs once a row, not
    once a pass.
    """
    own_rows = [row for row in rows if row.target in targets_of(recipe.objective)]
    steps = recipe.train.max_steps or ceil(recipe.train.epochs * len(own_rows) / recipe.train.rows_per_step)
    arms = [Arm(STUDENT, "student", _describe(recipe.objective), recipe.objective, steps, recipe.evaluate.target)]
    for name, kept in recipe.evaluate.ablations.items():
        terms = tuple(term for term in recipe.objective if term.name in kept)
        arms.append(Arm(name, "student", _describe(terms), terms, steps, _asked(recipe, terms)))
    passes = max(1.0, steps * recipe.train.rows_per_step / max(1, len(own_rows)))
    label = (_label_term(),)
    for name in recipe.evaluate.controls:
        factor = 1.0
        if name == "labels_same_compute":
            sizes = (student_parameters, teacher_parameters, passes)
            factor = _row_cost(recipe, recipe.objective, rows, *sizes) / _row_cost(recipe, label, rows, *sizes)
        same = "steps" if name == "labels_same_steps" else f"compute: {factor:.2f} x the steps"
        arms.append(Arm(name, "control", f"labels only, same {same}", label, max(1, round(steps * factor)), "label"))
    return arms


def choose(arms: Sequence[Arm], names: Sequence[str]) -> list[Arm]:
    """The named arms; ``all`` names every one."""
    if "all" in names:
        return list(arms)
    known = {arm.name: arm for arm in arms}
    for name in names:
        if name not in known:
            raise ConfigError(f"--arm {name}: this recipe has no such arm; expected all or one of {sorted(known)}.")
    return [known[name] for name in names]


def _asked(recipe: Recipe, terms: Sequence[Term]) -> Target:
    targets = targets_of(terms)
    return recipe.evaluate.target if recipe.evaluate.target in targets else targets[0]


def _label_term() -> Term:
    return Term(name="label", loss=CrossEntropy(), targets=("label",))


def _describe(terms: Sequence[Term]) -> str:
    return " + ".join(term.name.replace("_", " ") for term in terms)


def _row_cost(
    recipe: Recipe,
    terms: Sequence[Term],
    rows: Sequence[Row],
    student_parameters: int,
    teacher_parameters: Mapping[str, int],
    passes: float,
) -> float:
    """Mean floating point operations of a row of the arm with these terms."""
    wanted = targets_of(terms)
    total, count = 0.0, 0
    for row in rows:
        if row.target not in wanted:
            continue
        asked: dict[str, float] = {}  # each teacher's share of the training: until its last term ends
        for term in terms:
            if term.teacher is not None and row.target in term.targets:
                asked[term.teacher] = max(asked.get(term.teacher, 0.0), term.until)
        passes_of_student = 6 + 2 * recipe.scheme.extra_passes(terms, row.target)
        total += passes_of_student * student_parameters * row.num_tokens
        for name, share in asked.items():
            for one, part in _runs(recipe, name, share, passes):
                total += part * 2 * teacher_parameters[one] * row.tokens_for(one)
        count += 1
    return total / max(count, 1)


def _runs(recipe: Recipe, name: str, share: float, passes: float) -> Iterator[tuple[str, float]]:
    """A teacher and all that it is made of, each with the share of the student's ``passes`` in which it is run."""
    teacher = recipe.teachers[name]
    yield name, share
    for member in teacher.made_of():
        yield from _runs(recipe, member, 1 / passes if teacher.asked_once else share, passes)
