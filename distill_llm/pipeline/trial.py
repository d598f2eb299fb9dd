"""One trial: one arm trained with one learning rate, in this process or in a worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_llm.core.errors import ConfigError
from distill_llm.core.files import read_json, write_json
from distill_llm.data.view import StudentView
from distill_llm.models.load import LoadedModel, build_student, read_tokenizer
from distill_llm.objective import Objective, Term
from distill_llm.pipeline.arms import Arm
from distill_llm.pipeline.cuts import read_kept
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.recipe.recipe import Recipe
from distill_llm.schemes.on_policy import OnPolicy
from distill_llm.teachers.base import DeepTeacher
from distill_llm.teachers.frozen import Frozen
from distill_llm.teachers.student import StudentFacts
from distill_llm.teachers.viewed import viewed

if TYPE_CHECKING:
    from distill_llm.core.example import Example, Target
    from distill_llm.core.progress import Progress
    from distill_llm.data.rows import Row
    from distill_llm.evaluation.likelihood import LabelScores
    from distill_llm.evaluation.predict import Predictions
    from distill_llm.models.picture import Painter
    from distill_llm.recipe.train import TrainSpec
    from distill_llm.teachers.base import TensorTeacher
    from distill_llm.training.train import Trained
    from distill_llm.training.trainer import DistillTrainer


@dataclass(frozen=True, slots=True)
class Trial:
    """All that a training needs; travels to a worker as it is."""

    arm: Arm
    learning_rate: float
    recipe: Recipe
    rows: Sequence[Row]
    validation: Sequence[Example]
    tokenizer: Path
    folder: Path
    cut: Path | None = None
    """The file that says what the student's cut keeps, where that was measured."""

    @property
    def name(self) -> str:
        tuned = f", rate {self.learning_rate:g}" if self.recipe.train.tune else ""
        return f"{self.arm.name.replace('_', ' ')}{tuned}"


def student_view(
    recipe: Recipe, tokenizer: Any, is_encoder_decoder: bool, painter: Painter | None = None
) -> StudentView:
    return StudentView(
        tokenizer=tokenizer,
        is_encoder_decoder=is_encoder_decoder,
        prefixes=recipe.student.prefixes,
        chat=recipe.student.chat,
        max_input_tokens=recipe.train.max_input_tokens,
        max_target_tokens=recipe.train.max_target_tokens,
        prefix_side=recipe.student.prefix_side,
        painter=painter,
    )


def max_new_tokens(recipe: Recipe) -> int:
    return recipe.evaluate.max_new_tokens or recipe.train.max_target_tokens


def make_trial_trainer(trial: Trial, teachers: Mapping[str, TensorTeacher] | None = None) -> DistillTrainer:
    """The trainer of a trial, with the student as its seed draws it or its weights were.

    ``teachers``: those that are open already.
    """
    from distill_llm.training.train import make_trainer

    recipe, student = trial.recipe, _student(trial)
    spec = recipe.train.model_copy(update={"learning_rate": trial.learning_rate})
    if isinstance(recipe.scheme, OnPolicy) and recipe.scheme.hands_over(trial.arm.terms):
        return _make_trl_trainer(trial, recipe.scheme, student, spec)
    student = recipe.scheme.assemble(student, recipe.student, recipe.training_seed)
    opened = open_teachers(recipe, trial.arm.terms, student, teachers)
    return make_trainer(
        student,
        trial.rows,
        spec=spec,
        max_steps=trial.arm.max_steps,
        scheme=recipe.scheme,
        objective=Objective(trial.arm.terms),
        teachers=opened,
        validate=_validator(trial, student),
        folder=trial.folder,
        seed=recipe.training_seed,
    )


def _student(trial: Trial) -> LoadedModel:
    from transformers import set_seed

    from distill_llm.models.generate import default_device

    recipe = trial.recipe
    set_seed(recipe.training_seed)
    tokenizer = read_tokenizer(str(trial.tokenizer), where="student.tokenizer")
    student = build_student(recipe.student, tokenizer, kept=read_kept(trial.cut))
    student.model.to(default_device())
    return student


def _make_trl_trainer(trial: Trial, scheme: OnPolicy, student: LoadedModel, spec: TrainSpec) -> Any:
    """Trainer and fit know each other by transformers.Trainer alone."""
    from distill_llm.training.trl import make_trl_trainer

    (term,) = trial.arm.terms
    teacher = trial.recipe.teachers[term.teacher or ""]
    assert isinstance(teacher, Frozen), "the recipe was checked"
    return make_trl_trainer(
        student,
        trial.rows,
        spec=spec,
        max_steps=trial.arm.max_steps,
        scheme=scheme,
        term=term,
        teacher=teacher.load(_facts(student))[0],
        validate=_validator(trial, student),
        folder=trial.folder,
        seed=trial.recipe.training_seed,
    )


def run_trial(trial: Trial, progress: Progress, stop_when: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Trains, or gives what an earlier training came to. Raises Interrupted after a signal."""
    from distill_llm.core.processes import is_main_process
    from distill_llm.training.precision import choose_precision
    from distill_llm.training.train import fit

    done = trial.folder / "trained.json"
    if done.exists():
        return read_json(done)
    if trial.arm.max_steps:
        trainer = make_trial_trainer(trial)
        model: Any = trainer.model
        computes = choose_precision(trial.recipe.train.precision, model)
        progress.say(f"{trial.name}: computes in {computes.name} ({computes.why})")
        trained = fit(trainer, trial.folder, progress=progress, name=trial.name, stop_when=stop_when)
        precision = computes.name
    else:
        trained, precision = _save_as_it_starts(trial), "float32"
    result = asdict(trained) | {"learning_rate": trial.learning_rate, "precision": precision}
    if is_main_process():
        write_json(done, result)
    return result


def _save_as_it_starts(trial: Trial) -> Trained:
    """What a training without steps comes to: its model validated, and saved as its scheme saves."""
    from distill_llm.core.processes import is_main_process
    from distill_llm.training.train import Trained
    from distill_llm.training.trainer import save_learner

    recipe = trial.recipe
    student = recipe.scheme.assemble(_student(trial), recipe.student, recipe.training_seed)
    validate = _validator(trial, student)
    accuracy = validate(student.model.eval())["accuracy"] if validate else None
    if is_main_process():
        for name, model in recipe.scheme.each(student.model):
            folder = trial.folder / "model"
            save_learner(recipe.scheme, name, model, folder, student.tokenizer, student.painter)
    return Trained(0, 0, 0, 0.0, accuracy, recipe.scheme.learners[0], {})


def open_teachers(
    recipe: Recipe, terms: Sequence[Term], student: LoadedModel, there: Mapping[str, TensorTeacher] | None = None
) -> dict[str, TensorTeacher]:
    """The live teachers that some term names, and those that they are made of; each is opened once.

    ``there``: those that are open already.
    """
    opened = dict(there or {})
    for name in sorted({term.teacher for term in terms if term.teacher is not None} - recipe.scheme.provides):
        open_teacher(recipe, name, student, opened)
    objective = recipe.scheme.for_learners(Objective(terms))
    for learner, model in recipe.scheme.each(student.model):
        _open_layers(model, opened, objective.of(learner))
    return opened


def open_teacher(recipe: Recipe, name: str, student: LoadedModel, opened: dict[str, TensorTeacher]) -> TensorTeacher:
    """One of the recipe's teachers, and those that it is made of, which are added to ``opened`` or taken from it."""
    if name not in opened:
        spec = recipe.teachers[name].placed(RunFolder(recipe.folder).signals(name))
        members = [open_teacher(recipe, member, student, opened) for member in spec.members()]
        teacher, reader = spec.open(_facts(student), members), spec.reader(student)
        opened[name] = teacher if reader is None else viewed(teacher, name, reader)
    return opened[name]


def _facts(student: LoadedModel) -> StudentFacts:
    return StudentFacts(
        vocabulary=student.tokenizer.get_vocab(),
        is_encoder_decoder=student.is_encoder_decoder,
        device=str(student.model.device),
        model=student.model,
        picture=student.painter.shape if student.painter is not None else None,
    )


def _open_layers(student: Any, teachers: Mapping[str, TensorTeacher], objective: Objective) -> None:
    """Lets terms on layers look at student and teachers, and gives the student the heads that they learn.

    Raises ConfigError where a layer, an encoder or an attention that a term names does not exist.
    """
    reading = objective.reading()
    if not reading:
        return
    from distill_llm.models.layers import add_heads, shapes_of, show_attention

    show_attention(student, sorted(reading.attention), where="student")
    mine = shapes_of(student)
    widths: dict[str, list[tuple[int, int]]] = {}
    for term in objective.terms:
        if term.layers is None:
            continue
        teacher = teachers[term.teacher or ""]
        assert isinstance(teacher, DeepTeacher), "the recipe was checked"
        theirs = teacher.show(objective.reading(term.teacher))
        if term.side not in mine:
            raise ConfigError(
                f"objective.{term.name}.loss: it looks at an encoder, and the student is decoder-only. Remove `of`."
            )
        try:
            widths[term.name] = term.layers.widths(mine[term.side], theirs[term.side])
        except ConfigError as error:
            raise ConfigError(f"objective.{term.name}.loss.layers: {error}") from None
    add_heads(student, widths)


def answers(
    recipe: Recipe,
    model: Any,
    view: StudentView,
    examples: Sequence[Example],
    target: Target,
    *,
    progress: Progress,
    name: str,
) -> tuple[Predictions, LabelScores | None]:
    """What the model answers, as the recipe asks: written, or, of labels, the likeliest, then with their scores."""
    from distill_llm.evaluation.likelihood import score_labels
    from distill_llm.evaluation.predict import predict

    settings: dict[str, Any] = {
        "batch_rows": recipe.evaluate.batch_rows,
        "progress": progress,
        "name": name,
    }
    if recipe.evaluate.by == "likelihood" and target == "label":
        scores = score_labels(model, view, examples, **settings)
        return scores.predictions(recipe.task), scores
    most = max_new_tokens(recipe)
    return predict(model, view, examples, task=recipe.task, target=target, max_new_tokens=most, **settings), None


def _validator(trial: Trial, student: LoadedModel) -> Callable[[Any], dict[str, float]] | None:
    """The task's accuracy on the labelled validation examples; every rank scores its share.

    None without any, or where the arm is not chosen by it. Where several learn in one training, `accuracy` is that of
    the one that would become the student.
    """
    labelled = [example for example in trial.validation if example.label is not None]
    if not labelled or not trial.arm.validated:
        return None
    from distill_llm.core.processes import my_share, summed
    from distill_llm.core.progress import SILENT

    view = student_view(trial.recipe, student.tokenizer, student.is_encoder_decoder, student.painter)
    scheme = trial.recipe.scheme

    def accuracy(model: Any) -> float:
        part = my_share(labelled)
        right = 0
        if part:
            target = trial.arm.evaluate_target
            predictions, _ = answers(trial.recipe, model, view, part, target, progress=SILENT, name="validation")
            right = sum(bool(one.correct) for one in predictions.items)
        right, asked = summed(right, len(part))
        return right / max(asked, 1)

    def validate(model: Any) -> dict[str, float]:
        scores = {name: accuracy(one) for name, one in scheme.each(model)}
        best = {"accuracy": scores[scheme.student_among(scores)]}
        return best | {f"accuracy_{name}": score for name, score in scores.items() if len(scores) > 1}

    return validate
