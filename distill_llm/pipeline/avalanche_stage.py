"""What the models above a student answer on the test split, beside the student: the error avalanche of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from distill_llm.core.errors import ConfigError
from distill_llm.core.files import read_json, write_text
from distill_llm.evaluation.avalanche import Avalanche, measure_avalanche
from distill_llm.evaluation.predict import Predictions, predict
from distill_llm.models.generate import default_device
from distill_llm.models.load import choose_device, load_on, read_tokenizer
from distill_llm.models.vision import read_painter
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.pipeline.trial import max_new_tokens, student_view
from distill_llm.schemes.stages import STUDENT, on_the_way
from distill_llm.teachers.ensemble import Ensemble, mixed
from distill_llm.teachers.frozen import Frozen

if TYPE_CHECKING:
    from distill_llm.core.example import Example
    from distill_llm.core.progress import Progress
    from distill_llm.models.picture import Painter
    from distill_llm.recipe.recipe import Recipe
    from distill_llm.schemes.stages import Stage
    from distill_llm.teachers.base import TensorTeacherSpec

Right = list[bool]


def save_predictions(run: RunFolder, name: str, predictions: Predictions) -> None:
    lines = [json.dumps(asdict(one), ensure_ascii=False) for one in predictions.items]
    write_text(run.predictions(name), "\n".join(lines) + "\n")


def avalanche_of(
    recipe: Recipe, examples: Sequence[Example], run: RunFolder, answers: Mapping[str, Right], progress: Progress
) -> Avalanche | None:
    """Of the recipe's stages, with the teachers of the first one and the ensemble of the last; None of a single stage.

    ``answers``: those of the arms that are scored. A teacher that cannot be asked as the student is, is left out.
    """
    stages = [stage for stage in on_the_way(recipe.stages) if stage.scored]
    if len(stages) < 2 or any(stage.name not in answers for stage in stages):
        return None
    asked = _Asked(recipe, examples, run, progress)
    tops = [(name, asked.alone(name, spec)) for name, spec in _named(stages[0]) if asked.can_be(name, spec)]
    means = [
        (name, asked.together(name, spec, stages[-1]))
        for name, spec in _named(stages[-1])
        if isinstance(spec, Ensemble)
    ]
    beside = [(name.replace("_", " "), right) for name, right in means if right is not None]
    chain = [*tops, *((stage.name.replace("_", " "), answers[stage.name]) for stage in stages)]
    return measure_avalanche(chain, beside)


def _named(stage: Stage) -> list[tuple[str, TensorTeacherSpec]]:
    """The teachers that its terms name, in their order."""
    names = dict.fromkeys(term.teacher for term in stage.terms if term.teacher is not None)
    return [(name, stage.teachers[name]) for name in names]


@dataclass(frozen=True, slots=True)
class _Asked:
    """Asks models what the student is asked."""

    recipe: Recipe
    examples: Sequence[Example]
    run: RunFolder
    progress: Progress

    def can_be(self, name: str, spec: TensorTeacherSpec) -> bool:
        """Says why not, where it cannot."""
        if isinstance(spec, Ensemble):
            return False
        why = "it does not read what the student reads"
        if isinstance(spec, Frozen) and spec.own_view() is None:
            try:
                spec.check()
            except ConfigError as error:  # it may be gone since it taught
                why = str(error)
            else:
                return True
        self.progress.say(f"error avalanche: teacher {name} is left out: {why}")
        return False

    def alone(self, name: str, spec: TensorTeacherSpec) -> Right:
        model, tokenizer, painter = self._load(name, spec)
        return self._answers(name, model, tokenizer, painter)

    def together(self, name: str, spec: TensorTeacherSpec, stage: Stage) -> Right | None:
        """None where one of the members cannot be asked, or where all read pictures."""
        assert isinstance(spec, Ensemble)
        if self.recipe.student.picture is not None:
            self.progress.say(f"error avalanche: {name} is left out: several models are asked as one about text alone")
            return None
        members = [(member, stage.teachers[member]) for member in spec.members()]
        if not all(self.can_be(member, one) for member, one in members):
            return None
        loaded = [self._load(member, one) for member, one in members]
        weights = spec.weights or (1.0,) * len(members)
        mix = partial(mixed, weights=weights, mean=spec.mean, by=spec.by)
        return self._answers(name, [model for model, _, _ in loaded], loaded[0][1], None, mix)

    def _load(self, name: str, spec: TensorTeacherSpec) -> tuple[Any, Any, Painter | None]:
        assert isinstance(spec, Frozen)
        where = f"teachers.{name}"
        device = default_device() if spec.device == "auto" else choose_device(spec.device, where=f"{where}.device")
        model = load_on(device, spec.model, spec.revision, where=where, dtype=spec.dtype, load_in=spec.load_in)
        picture = self.recipe.student.picture
        painter = read_painter(picture, spec.model, spec.revision, model.config, where=where) if picture else None
        return model, read_tokenizer(spec.model, spec.revision, where=where), painter

    def _answers(self, name: str, model: Any, tokenizer: Any, painter: Painter | None, mix: Any = None) -> Right:
        one = model if mix is None else model[0]
        predictions = predict(
            model,
            student_view(self.recipe, tokenizer, one.config.is_encoder_decoder, painter),
            self.examples,
            task=self.recipe.task,
            target=read_json(self.run.result(STUDENT))["target"],
            batch_rows=self.recipe.evaluate.batch_rows,
            max_new_tokens=max_new_tokens(self.recipe),
            progress=self.progress,
            name=f"test, {name.replace('_', ' ')}",
            mix=mix,
        )
        save_predictions(self.run, f"teachers/{name}", predictions)
        return [bool(one.correct) for one in predictions.items]
