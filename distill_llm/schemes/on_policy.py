"""On-policy distillation: the student writes, and the teacher says what it would have written at each place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from distill_llm.core.component import Component
from distill_llm.core.errors import ConfigError
from distill_llm.core.example import TARGETS, Target
from distill_llm.core.schedule import Schedule, number_at
from distill_llm.core.signals import OWN, Batch, view_column
from distill_llm.schemes.base import Moment, Scheme
from distill_llm.teachers.base import TensorTeacherSpec, with_members

if TYPE_CHECKING:
    from jaxtyping import Bool
    from torch import Tensor

    from distill_llm.data.rows import Row
    from distill_llm.models.generate import Written
    from distill_llm.objective import Term

_POINTS = 100  # at which a schedule is looked at for its mean


class Rollouts(Component):
    """How vLLM writes for the trainer of TRL (`pip install 'distill-llm[vllm]'`)."""

    mode: Literal["colocate", "server"] = Field(
        default="colocate", description="on the GPUs that train, or a server that `trl vllm-serve` started"
    )
    gpu_memory_fraction: float = Field(default=0.3, gt=0, le=1, description="of a GPU that trains (colocate)")
    tensor_parallel_size: int = Field(default=1, gt=0, description="GPUs that hold one replica together (colocate)")
    server: str = Field(default="", description="its address, such as http://host:8000; needed by mode: server")

    @model_validator(mode="after")
    def _server_has_an_address(self) -> Rollouts:
        if bool(self.server) != (self.mode == "server"):
            raise ValueError("`server` is the address for mode: server, and for that mode alone")
        return self


class OnPolicy(Scheme):
    """Generalised knowledge distillation (GKD, Agarwal et al. 2024, arXiv:2306.13649, sec. 3.1 and algorithm 1).

    In a share of the steps, or of the rows, the student itself writes the targets about which a teacher is asked, and
    the terms with a teacher compare both models there; the text gets no gradient. Terms without a teacher keep to the
    data's texts: nobody knows whether the student's are right. The loss is each term's own, with its temperature.
    """

    kind: Literal["on_policy"] = "on_policy"
    writes: ClassVar[bool] = True
    student_fraction: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | Schedule = Field(
        default=0.5, description="the share (lambda) whose targets the student writes; a number, or a schedule"
    )
    draw: Literal["step", "row"] = Field(
        default="step", description="whether the share is one of steps, as in the paper, or of the rows of each"
    )
    targets: tuple[Target, ...] = Field(
        default=(), description="those that it may write; empty: all about which some term asks a teacher"
    )
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="of its writing; 0 is greedy")
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=128, gt=0, description="a text ends here, without an end of sequence")
    engine: Literal["trainer", "trl"] = Field(
        default="trainer",
        description="trl: the DistillationTrainer of TRL trains, for decoder-only students at scale; "
        "`pip install 'distill-llm[trl]'`",
    )
    vllm: Rollouts | None = Field(default=None, description="with engine: trl, vLLM writes; absent: the model itself")

    @field_validator("student_fraction")
    @classmethod
    def _is_a_share(cls, fraction: float | Schedule) -> float | Schedule:
        if isinstance(fraction, Schedule) and max(fraction.start, fraction.end) > 1:
            raise ValueError(
                f"a share is at most 1, and this schedule goes from {fraction.start:g} to {fraction.end:g}"
            )
        return fraction

    def check_recipe(self, recipe: Any) -> None:
        if self.vllm is not None and self.engine != "trl":
            raise ValueError("scheme.vllm: it writes for engine: trl alone. Set that, or remove `vllm`")
        if self.student_fraction == 0 and self.engine != "trl":
            return
        judged = [term for term in recipe.objective if term.teacher is not None]
        written = {target for term in judged for target in term.targets if self._may_write(target)}
        if not written:
            raise ValueError(
                f"scheme: no term asks a teacher about {list(self.targets) or 'any target'}, so that nobody says what "
                "the student's own texts are worth. Add a term with a `teacher`, or take kind: step_by_step"
            )
        for term in judged:
            if written & set(term.targets):
                _check_teacher(recipe.teachers, term)
        if self.engine == "trl":
            from distill_llm.schemes.trl_checks import check_for_trl

            check_for_trl(recipe)

    def check(self, recipe: Any) -> None:
        if self.engine == "trl":
            from distill_llm.schemes.trl_checks import check_installed

            check_installed(recipe)

    def hands_over(self, terms: Sequence[Term]) -> bool:
        """Whether TRL trains on these terms: those of an arm without a teacher are left to our trainer."""
        return self.engine == "trl" and any(term.teacher is not None for term in terms)

    def extra_passes(self, terms: Sequence[Term], target: Target) -> float:
        """Writing reads each token once, with what it read before in a cache."""
        asked = [term.until for term in terms if term.teacher is not None and target in term.targets]
        if not asked or not self._may_write(target):
            return 0.0
        points = [point / _POINTS for point in range(round(max(asked) * _POINTS))]
        return sum(number_at(self.student_fraction, point) for point in points) / _POINTS

    def written_tokens(self, target: Target) -> int:
        return self.max_new_tokens if self.student_fraction != 0 and self._may_write(target) else 0

    def prepare(self, batches: list[Batch], model: Any, moment: Moment) -> list[Batch]:
        """Draws by seed, step and the row's key, so that any micro-batches and any processes write the same texts."""
        share = number_at(self.student_fraction, moment.progress)
        if share == 0 or not self._step_is_drawn(share, moment):
            return batches
        _refuse_sharded(model)
        return [self._rewritten(batch, model, share, moment) for batch in batches]

    def _step_is_drawn(self, share: float, moment: Moment) -> bool:
        return self.draw == "row" or _number(f"{moment.seed} step {moment.step}") < share

    def _rewritten(self, batch: Batch, model: Any, share: float, moment: Moment) -> Batch:
        keys = batch["keys"].tolist()
        chosen = self._taught(batch, moment).nonzero().flatten().tolist()
        names = {place: f"{moment.seed} step {moment.step} row {keys[place]}" for place in chosen}
        if self.draw == "row":
            names = {place: name for place, name in names.items() if _number(f"{name} drawn") < share}
        if not names:
            return batch
        texts = self._texts(moment.collator.rows_of(batch), names, model, moment.tokenizer)
        return moment.collator.rewritten(batch, texts)

    def _taught(self, batch: Batch, moment: Moment) -> Bool[Tensor, " B"]:
        """The rows that it may write: of which some teacher, asked now, will have something to say."""
        import torch

        found = torch.zeros_like(batch["targets"], dtype=torch.bool)
        for term in moment.objective.terms:
            if term.teacher is None:
                continue
            asked = term.owns(batch["targets"])
            places = batch.get(view_column(term.teacher, "places"))
            found = found | (asked if places is None else asked & (places >= 0).any(1))
        allowed = [TARGETS.index(target) for target in TARGETS if self._may_write(target)]
        return found & torch.isin(batch["targets"] % OWN, batch["targets"].new_tensor(allowed))

    def _texts(
        self, rows: Sequence[Row], names: Mapping[int, str], model: Any, tokenizer: Any
    ) -> dict[int, tuple[int, ...]]:
        """What the student writes in the rows at the places ``names``, in place of their targets, as token ids."""
        from distill_llm.models.generate import Generator

        found: dict[int, tuple[int, ...]] = {}
        for prefix, places in _by_prefix(rows, names):
            generator = Generator(
                model,
                tokenizer,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                decoder_prefix=prefix,
            )
            written = generator.write_ids(
                [rows[place].input_ids for place in places], [names[place] for place in places]
            )
            found |= {place: _label_ids(one) for place, one in zip(places, written, strict=True)}
        return found

    def _may_write(self, target: Target) -> bool:
        return not self.targets or target in self.targets


def _check_teacher(teachers: Mapping[str, TensorTeacherSpec], term: Term) -> None:
    """Raises ValueError where what the term's teacher is made of cannot speak of texts that are not written yet."""
    assert term.teacher is not None
    where = f"objective.{term.name}.teacher: '{term.teacher}'"
    for name in with_members(teachers, term.teacher):
        if teachers[name].asked_once:
            raise ValueError(
                f"{where}: what it says of the data's texts was written down before, and the student writes others "
                "(scheme: on_policy). Name a teacher that is run beside the student, or keep scheme.targets to others"
            )
        if teachers[name].speaks_otherwise():
            raise ValueError(
                f"{where}: it has a tokenizer of its own, whose tokens are laid beside the student's before the "
                "training, and the student writes others then (scheme: on_policy). Name a teacher with the student's "
                "tokenizer, or keep scheme.targets to others"
            )


def _refuse_sharded(model: Any) -> None:
    from distill_llm.models.parts import is_sharded

    if is_sharded(model):
        raise ConfigError(
            "scheme: on_policy writes in each process by itself, as long as its own texts take, but the student's "
            "weights are shared among processes (FSDP, DeepSpeed). Train in processes that hold it whole (torchrun "
            "alone: DDP), or set scheme.engine: trl"
        )


def _number(name: str) -> float:
    """A number in [0, 1) that depends on ``name`` alone."""
    from distill_llm.models.sampling import uniforms

    return float(uniforms(name, 1)[0])


def _by_prefix(rows: Sequence[Row], places: Mapping[int, str]) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """Places whose rows have one decoder prefix: a batch of the generator has one."""
    found: dict[tuple[int, ...], list[int]] = {}
    for place in places:
        found.setdefault(tuple(rows[place].prefix_ids), []).append(place)
    yield from found.items()


def _label_ids(written: Written) -> tuple[int, ...]:
    return written.ids if written.end is None else (*written.ids, written.end)
