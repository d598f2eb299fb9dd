"""Teachers of soft labels that cannot be had: refused, or left out where an ensemble may do without them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from distill_llm.core.errors import ConfigError
from distill_llm.core.files import read_json, write_json
from distill_llm.core.processes import main_first
from distill_llm.core.progress import Progress
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.recipe.recipe import Recipe


def failing_teachers(recipe: Recipe) -> dict[str, str]:
    """Names of teachers that cannot be had and that nobody needs, and why. Loads no weights.

    Raises ConfigError for one that is needed: named by a term, by a teacher that does not drop it, or by an ensemble
    that has no other.
    """
    found: dict[str, str] = {}
    for name, teacher in recipe.teachers.items():
        try:
            teacher.check()
        except ConfigError as error:
            if not _dispensable(recipe, name):
                raise
            found[name] = str(error)
    for name, teacher in recipe.teachers.items():
        if teacher.members() and set(teacher.members()) <= set(found):
            reasons = "; ".join(f"{member}: {found[member]}" for member in teacher.members())
            raise ConfigError(f"teachers.{name}: none of its teachers can be had. {reasons}")
    return found


def _dispensable(recipe: Recipe, name: str) -> bool:
    users = [teacher for teacher in recipe.teachers.values() if name in teacher.made_of()]
    asked = any(term.teacher == name for term in recipe.objective)
    return bool(users) and not asked and all(user.may_lack(name) for user in users)


def without(recipe: Recipe, names: Collection[str]) -> Recipe:
    """The recipe with ensembles of what is left."""
    if not names:
        return recipe
    teachers = {name: one.without(names) for name, one in recipe.teachers.items() if name not in names}
    return recipe.model_copy(update={"teachers": teachers})


def settled(recipe: Recipe, run: RunFolder, progress: Progress) -> Recipe:
    """The recipe as it is trained: all processes and all arms of a run do without the same teachers, or with all.

    Raises ConfigError where one is gone that some arm has learned from.
    """

    def settle() -> None:
        if not run.training_has_begun or not run.lacking.exists():
            write_json(run.lacking, failing_teachers(recipe))

    before = read_json(run.lacking) if run.training_has_begun and run.lacking.exists() else None
    if before is not None:
        gone = sorted(set(failing_teachers(without(recipe, before))) - set(before))
        if gone:
            raise ConfigError(
                f"teachers.{gone[0]}: it cannot be had any more, and a student of this run has learned from it. Bring "
                "it back, or choose another run_dir to train without it."
            )
    main_first(settle)
    lacking: Mapping[str, str] = read_json(run.lacking)
    for sentence in warnings_of(lacking):
        progress.say(f"warning: {sentence}")
    return without(recipe, lacking)


def warnings_of(lacking: Mapping[str, str]) -> list[str]:
    return [f"The teacher '{name}' is left out of its ensemble: {reason}" for name, reason in lacking.items()]
