"""A run's model in the formats of other runtimes, each opened again there and held against the student."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_llm.core.errors import ConfigError, DataError, DistillError, ExportError
from distill_llm.core.files import fingerprint, read_json, storage, write_json
from distill_llm.core.quiet import quiet_libraries
from distill_llm.evaluation.export_report import (
    Answers,
    ExportReport,
    TeacherScore,
    build_report,
    read_report,
    save_report,
)
from distill_llm.evaluation.predict import ask, predict_with, questions
from distill_llm.evaluation.scorecard import installed_versions, load_scorecard
from distill_llm.evaluation.speed import speed_of, time_singly
from distill_llm.export.base import ALL, Answering, Format, Writer, chosen_formats
from distill_llm.export.in_torch import written_by
from distill_llm.models.folder import is_adapter, weight_bytes
from distill_llm.models.fresh import weightless
from distill_llm.models.load import LoadedModel, load_model, read_config, read_tokenizer
from distill_llm.models.lora import base_of
from distill_llm.models.quantize import is_quantized
from distill_llm.models.vision import read_painter
from distill_llm.pipeline.rationale_stage import load_examples
from distill_llm.pipeline.run_folder import RunFolder, open_run
from distill_llm.pipeline.score_stage import processor
from distill_llm.pipeline.trial import max_new_tokens, student_view
from distill_llm.recipe.recipe import Recipe
from distill_llm.schemes.stages import STUDENT

if TYPE_CHECKING:
    from distill_llm.core.example import Example, Target
    from distill_llm.core.progress import Progress
    from distill_llm.data.view import StudentView

EXAMPLES = 200
_TIMED = 50  # of them alone, one after the other


def export_model(
    run_dir: str | Path,
    names: Sequence[str],
    *,
    arm: str = STUDENT,
    examples: int = EXAMPLES,
    force: bool = False,
    progress: Progress,
) -> list[ExportReport]:
    """Writes an arm's model in the formats of these names into the run's folder, and says what each is worth.

    What is there already, of the same weights and asked the same, stays. Raises ConfigError, before a weight is loaded,
    for a format or an arm that is none, a package that is missing, and a model that a named format does not hold;
    of ``all``, such formats are left out.
    """
    quiet_libraries()  # before anything is imported: looking for packages imports some
    chosen = chosen_formats(names)
    run, recipe = open_run(run_dir)
    if arm not in run.trained_arms():
        trained = run.trained_arms()
        raise ConfigError(
            f"{run.root}: no arm '{arm}' is trained here; there are {trained}."
            if trained
            else f"{run.root}: no student is trained here yet. Type: distill-llm train {run.recipe}"
        )
    job = _Job(run, recipe, arm, examples, progress)
    fitting = [one for one in chosen if job.fits(one, refuses=one.name in names or ALL not in names)]
    done = {one.name: read_report(run.export(arm, one.name)) for one in fitting}
    for number, one in enumerate(fitting):
        report = done[one.name]
        if force or report is None or report.made_of != job.made_of(one):
            progress.advance("export", number, len(fitting), one.name)
            done[one.name] = job.export(one)
    progress.advance("export", len(fitting), len(fitting))
    return [report for report in done.values() if report is not None]


def finished_exports(run: RunFolder, arm: str) -> list[tuple[Path, ExportReport]]:
    """Folders and reports of an arm's exports, by name. Raises ConfigError where one is of other weights than the arm
    has now."""
    weights = weights_of_arm(run, arm)
    found = []
    for folder in sorted(run.exports(arm).glob("*/")):
        report = read_report(folder) if not folder.name.endswith(_DRAFT) else None
        if report is None:
            continue
        if not report.made_of.startswith(f"{weights}-"):
            raise ConfigError(
                f"{folder}: it was exported from other weights than '{arm}' has now. Type: distill-llm export "
                f"{run.root} --format {folder.name}" + (f" --arm {arm}" if arm != STUDENT else "")
            )
        found.append((folder, report))
    return found


def weights_of_arm(run: RunFolder, arm: str) -> str:
    """16 digits that change with the weights, those below an adapter included."""
    from distill_llm.models.load import revision_of

    folder = str(run.model(arm))
    parts = [revision_of(folder, where=f"arm {arm}")]
    if is_adapter(folder):
        parts.append(revision_of(*base_of(folder), where=f"arm {arm}"))
    return fingerprint(parts)


_DRAFT = ".part"


@dataclass
class _Job:
    """One arm on its way into several formats."""

    run: RunFolder
    recipe: Recipe
    arm: str
    num_examples: int
    progress: Progress

    def fits(self, one: Format, *, refuses: bool) -> bool:
        """Whether the model can be written so; ConfigError where not and it ``refuses``."""
        why = one.why_not(self._weightless, self._tokenizer)
        if why and refuses:
            raise ConfigError(f"--format {one.name}: '{self.arm}' cannot be written so: {why}.")
        if why:
            self.progress.say(f"{one.name} is left out: {why}.")
        return not why

    def made_of(self, one: Format | None = None) -> str:
        """What decides a report, the weights first; without a format, that of the student's own answers."""
        asked = {
            "target": self._target,
            "max_new_tokens": max_new_tokens(self.recipe),
            "batch_rows": self.recipe.evaluate.batch_rows,
            "examples": [example.id for example in self._examples],
            "format": one.name if one is not None else "",
        }
        return f"{self._weights}-{fingerprint(asked)}"

    def export(self, one: Format) -> ExportReport:
        """Writes, opens, asks; what is in its place afterwards is whole."""
        student = self._student_answers()
        folder = self.run.export(self.arm, one.name)
        draft = Path(f"{folder}{_DRAFT}")
        try:
            with storage(folder):
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir(parents=True)
                self.progress.say(f"{one.name}: writing")
                one.write(self._student, draft)
            answers = self._ask(self._opened(one, draft), one.name, self.made_of(one), one.num_bytes(draft))
            report = self._report(one, answers, student)
            save_report(draft, report)
            with storage(folder):
                shutil.rmtree(folder, ignore_errors=True)
                draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return report

    def _report(self, one: Format, answers: Answers, student: Answers) -> ExportReport:
        return build_report(
            answers,
            student,
            name=one.name,
            runtime=one.runtime,
            example_ids=[example.id for example in self._examples],
            teachers=_teachers(self.run),
            seed=self.recipe.seed,
            resamples=self.recipe.evaluate.resamples,
            threads=_threads(),
            hardware=processor(),
            versions=installed_versions(one.packages),
            created=datetime.datetime.now(datetime.UTC).date(),
        )

    def _opened(self, one: Format, folder: Path) -> Writer:
        try:
            return one.open(folder, self._answering)
        except DistillError:
            raise
        except Exception as error:  # whatever a runtime raises
            raise ExportError(f"format {one.name}: {one.runtime} does not open what was written: {error}") from error

    def _student_answers(self) -> Answers:
        """The student's own in PyTorch, asked once for all formats."""
        path = self.run.exports(self.arm) / "student.json"
        made_of = self.made_of()
        if path.exists():
            found = Answers.model_validate(read_json(path))
            if found.made_of == made_of:
                return found
        writer = written_by(self._student.model, self._student.tokenizer, self._answering)
        answers = self._ask(writer, "student", made_of, weight_bytes(self._folder))
        write_json(path, answers.model_dump(mode="json"))
        return answers

    def _ask(self, writer: Writer, name: str, made_of: str, num_bytes: int | None) -> Answers:
        examples, view, target = self._examples, self._view, self._target
        singly = time_singly(partial(ask, writer, view), questions(view, examples[:_TIMED], target))
        predictions = predict_with(
            writer,
            view,
            examples,
            task=self.recipe.task,
            target=target,
            batch_rows=self.recipe.evaluate.batch_rows,
            progress=self.progress,
            name=f"answers, {name}",
        )
        return Answers(
            made_of=made_of,
            texts=tuple(one.text for one in predictions.items),
            right=tuple(bool(one.correct) for one in predictions.items),
            speed=speed_of(singly, examples=len(examples), seconds=predictions.seconds),
            bytes=num_bytes,
        )

    @property
    def _folder(self) -> str:
        return str(self.run.model(self.arm))

    @property
    def _where(self) -> str:
        return f"arm {self.arm}"

    @cached_property
    def _target(self) -> Target:
        return read_json(self.run.result(self.arm))["target"]

    @property
    def _answering(self) -> Answering:
        return Answering(max_new_tokens(self.recipe), self._view.decoder_prefix(self._target), _threads())

    @cached_property
    def _weights(self) -> str:
        return weights_of_arm(self.run, self.arm)

    @cached_property
    def _examples(self) -> list[Example]:
        found = load_examples(self.recipe).test[: self.num_examples]
        if not found or any(example.label is None for example in found):
            raise DataError(
                f"{self.run.root}: an export is held against the labels of test examples: add a labelled test split."
            )
        return list(found)

    @cached_property
    def _tokenizer(self) -> Any:
        return read_tokenizer(self._folder, where=self._where)

    @cached_property
    def _weightless(self) -> Any:
        config = read_config(self._folder, where=self._where)
        if is_quantized(config):
            raise ConfigError(
                f"{self._where}: its weights are torchao's integers already, which no other format takes. Export the "
                "arm that it was made from."
            )
        return weightless(config)

    @cached_property
    def _student(self) -> LoadedModel:
        model = load_model(self._folder, where=self._where).eval()
        return LoadedModel(model, self._tokenizer, self._view.painter)

    @cached_property
    def _view(self) -> StudentView:
        config, picture = self._weightless.config, self.recipe.student.picture
        painter = read_painter(picture, self._folder, "main", config, where=self._where) if picture else None
        return student_view(self.recipe, self._tokenizer, bool(config.is_encoder_decoder), painter)


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _teachers(run: RunFolder) -> list[TeacherScore]:
    """Those that the scorecard has a size or a speed of: models of this machine."""
    if not run.scorecard.exists():
        return []
    return [
        TeacherScore(name=one.name, accuracy=one.accuracy, bytes=one.bytes, examples_per_second=one.examples_per_second)
        for one in load_scorecard(run.root).entries
        if one.role == "teacher" and (one.bytes or one.examples_per_second)
    ]
