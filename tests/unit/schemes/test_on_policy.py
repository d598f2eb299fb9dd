"""The student writes, and the teacher says what it would have written: against formulas in float64, and exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import TrainerCallback, set_seed

from distill_llm.core.errors import ConfigError, Interrupted
from distill_llm.core.schedule import Schedule
from distill_llm.core.signals import IGNORE_INDEX, OWN, Batch
from distill_llm.data.collate import Collator
from distill_llm.data.rows import Row, RowView
from distill_llm.losses.cross_entropy import CrossEntropy
from distill_llm.losses.forward_kl import ForwardKL
from distill_llm.losses.hint import Hint
from distill_llm.losses.reverse_kl import ReverseKL
from distill_llm.objective import Objective, Term
from distill_llm.recipe.train import TrainSpec
from distill_llm.schemes.base import Moment
from distill_llm.schemes.on_policy import OnPolicy
from distill_llm.schemes.step_by_step import StepByStep
from distill_llm.teachers.frozen import FrozenTeacher
from distill_llm.teachers.view import Reader, TeacherView
from distill_llm.teachers.viewed import viewed
from distill_llm.training.train import fit, make_trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from distill_llm.models.load import LoadedModel
    from distill_llm.schemes.base import Scheme
    from distill_llm.training.trainer import DistillTrainer

LABEL, RATIONALE = 0, 1
ROWS = [
    row
    for example in range(4)
    for row in (
        Row(example, "label", [5, 6, 7 + example], [8 + example % 3, 1]),
        Row(example, "rationale", [9, 6, 7 + example, *range(20, 20 + example)], [*range(10, 12 + 3 * example), 1]),
    )
]
TERMS = (
    Term(name="label", loss=CrossEntropy(), targets=("label",)),
    Term(name="rationale", loss=CrossEntropy(), targets=("rationale",), weight=0.5),
    Term(name="soft", loss=ReverseKL(temperature=2.0), targets=("rationale",), teacher="big", weight=0.7),
)
ALWAYS = OnPolicy(student_fraction=1.0, temperature=0.0, max_new_tokens=6)


def _trainer(
    student: LoadedModel,
    folder: Path,
    scheme: Scheme,
    teachers: Mapping[str, Any],
    *,
    terms: Sequence[Term] = TERMS,
    rows: Sequence[Row] = ROWS,
    **spec: Any,
) -> DistillTrainer:
    set_seed(17)
    keys = {"max_steps": 4, "rows_per_step": 8, "rows_per_batch": 8, "learning_rate": 1e-2, "validate_every": 2}
    found = TrainSpec.model_validate(keys | spec)
    return make_trainer(
        student,
        rows,
        spec=found,
        max_steps=found.max_steps,
        scheme=scheme,
        objective=Objective(terms),
        teachers=teachers,
        validate=None,
        folder=folder,
        seed=17,
    )


def _teacher(tiny_model: Callable[..., LoadedModel]) -> dict[str, FrozenTeacher]:
    model = tiny_model(seed=9)
    return {"big": FrozenTeacher(model.model, len(model.tokenizer))}


def _batch(trainer: DistillTrainer) -> Batch:
    """All rows as one step sees them."""
    (batch,), _ = trainer.get_batch_samples(iter([trainer.collator(ROWS)]), 1, torch.device("cpu"))
    return batch


def _labels(batch: Batch) -> list[list[int]]:
    return [[token for token in labels if token != IGNORE_INDEX] for labels in batch["labels"].tolist()]


def _logits(model: Any, row: Row, labels: Sequence[int]) -> torch.Tensor:
    """Of each token of ``labels``, alone in a batch."""
    if model.config.is_encoder_decoder:
        begin = [model.config.decoder_start_token_id, *row.prefix_ids, *labels[:-1]]
        found = model(input_ids=torch.tensor([row.input_ids]), decoder_input_ids=torch.tensor([begin])).logits[0]
        return found[len(row.prefix_ids) :]
    ids = torch.tensor([[*row.input_ids, *labels]])
    return model(input_ids=ids).logits[0, len(row.input_ids) - 1 : -1]


def _greedy(model: Any, row: Row, limit: int, ends: Sequence[int] = (0, 1)) -> list[int]:
    """Word by word, the likeliest one: the naive way, without a cache. Both the pad and the end token end a text."""
    found: list[int] = []
    with torch.no_grad():
        while len(found) < limit and not (found and found[-1] in ends):
            found.append(int(_logits(model, row, [*found, 0])[-1].argmax()))
    return found


@pytest.mark.parametrize("chunk_tokens", ["auto", 0, 3])
def test_one_step_is_the_formula_in_float64(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path, chunk_tokens: Any
) -> None:
    """Labels learn by cross-entropy from the data; rationales are the student's own, and only the teacher judges."""
    student, teachers = tiny_model(seed=3), _teacher(tiny_model)
    trainer = _trainer(student, tmp_path, ALWAYS, teachers, chunk_tokens=chunk_tokens)
    batches, counts = trainer.get_batch_samples(iter([trainer.collator(ROWS)]), 1, torch.device("cpu"))
    loss = trainer.compute_loss(student.model, batches[0], num_items_in_batch=counts)
    loss.backward()
    found = {name: weight.grad.clone() for name, weight in student.model.named_parameters() if weight.grad is not None}

    model, big = student.model.double().eval(), teachers["big"]._model.double()
    model.zero_grad()
    width = len(student.tokenizer)
    total, divergence = {"label": 0, "soft": 0}, torch.zeros(2, dtype=torch.float64)
    for row in ROWS:
        if row.target == "label":
            said = _logits(model, row, row.label_ids).log_softmax(-1)
            divergence[0] = divergence[0] - said[range(len(row.label_ids)), list(row.label_ids)].sum()
            total["label"] += len(row.label_ids)
            continue
        own = _greedy(model, row, 6)
        q = (_logits(model, row, own)[:, :width] / 2).log_softmax(-1)
        p = (_logits(big, row, own)[:, :width].detach() / 2).log_softmax(-1)
        divergence[1] = divergence[1] + 4 * (q.exp() * (q - p)).sum()
        total["soft"] += len(own)
    expected = divergence[0] / total["label"] + 0.7 * divergence[1] / total["soft"]
    assert counts.tolist() == [total["label"], 0, total["soft"]]
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    expected.backward()
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(found[name].double(), weight.grad, atol=1e-5, rtol=1e-4, msg=name)


LAYOUTS: dict[str, dict[str, Any]] = {"padded": {"packing": "never"}, "laid_out": {"packing": "auto"}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_is_made_anew_as_if_the_data_had_these_texts(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path, layout: str
) -> None:
    student = tiny_model(seed=3)
    trainer = _trainer(student, tmp_path, ALWAYS, _teacher(tiny_model), **LAYOUTS[layout])
    if not student.is_encoder_decoder and layout == "laid_out":
        trainer.collator = replace(trainer.collator, packs=True)
    batch = _batch(trainer)
    own = [
        labels if row.target == "rationale" else row.label_ids for row, labels in zip(ROWS, _labels(batch), strict=True)
    ]
    expected = trainer.collator([replace(row, label_ids=ids) for row, ids in zip(ROWS, own, strict=True)])
    assert expected.keys() == batch.keys()
    expected["targets"] = expected["targets"] + OWN * (expected["targets"] == RATIONALE)
    expected["keys"] = torch.tensor([row.key for row in ROWS])
    for name, column in expected.items():
        assert torch.equal(batch[name], column), name
    for row, ids in zip(ROWS, own, strict=True):
        if row.target == "rationale":
            assert ids == _greedy(student.model.eval(), row, 6)


def test_a_batch_gives_back_its_rows_with_their_views_and_prefixes() -> None:
    view = RowView([7, 7, 8], [4, 5, 6, 1], [0, 2, 3])
    rows = [
        Row(0, "rationale", [5, 6], [7, 8, 1], 0.1, (30, 31), {"big": view}),
        Row(0, "label", [5, 6, 7], [8, 1], 1.0, (32,), {"big": RowView([2], [2], [-1, -1])}),
    ]
    pair = Collator(0, 0, part_tokens=8, views={"big": Collator(0, None)})
    (first, second) = pair.rows_of(pair(rows))
    for found, row in ((first, rows[0]), (second, rows[1])):
        assert found.agreement == pytest.approx(row.agreement)
        assert replace(found, agreement=1.0) == replace(row, agreement=1.0)
    new = pair.rows_of(pair.rewritten(pair(rows), {0: (9, 9), 1: (4,)}))
    assert [list(row.label_ids) for row in new] == [[9, 9], [4]]
    assert (list(new[0].views["big"].label_ids), list(new[0].views["big"].places)) == ([9, 9], [0, 1])
    assert (list(new[1].views["big"].label_ids), list(new[1].views["big"].places)) == ([2], [-1])
    alone = Collator(0, None, packs=True)
    plain = [replace(row, prefix_ids=(), views={}) for row in rows]
    assert [list(row.input_ids) for row in alone.rows_of(alone(plain))] == [[5, 6], [5, 6, 7]]


def test_the_decoder_s_prefix_stays_before_what_is_written(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    prefixed = [replace(row, prefix_ids=(30, 31) if row.target == "rationale" else (33,)) for row in ROWS]
    student = tiny_t5(seed=3)
    trainer = _trainer(student, tmp_path, ALWAYS, _teacher(tiny_t5), rows=prefixed)
    (batch,), _ = trainer.get_batch_samples(iter([trainer.collator(prefixed)]), 1, torch.device("cpu"))
    for row, ids, decoder in zip(prefixed, _labels(batch), batch["decoder_input_ids"].tolist(), strict=True):
        if row.target == "rationale":
            assert ids == _greedy(student.model.eval(), row, 6)
            assert decoder[: 2 + len(ids)] == [0, 30, 31, *ids[:-1]]


def test_a_fraction_of_nothing_is_the_offline_run_bit_for_bit(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    dropout = "attention_dropout" if tiny_model().model.config.model_type == "llama" else "dropout_rate"
    found = []
    for name, scheme in (("offline", StepByStep()), ("on", OnPolicy(student_fraction=0.0)), ("drawn", ALWAYS)):
        student = tiny_model(seed=5, **{dropout: 0.2})
        fit(_trainer(student, tmp_path / name, scheme, _teacher(tiny_model), rows_per_batch=4), tmp_path / name)
        found.append(student.model.state_dict())
    offline, nothing, always = found
    assert all(torch.equal(weight, nothing[name]) for name, weight in offline.items())
    assert not all(torch.equal(weight, always[name]) for name, weight in offline.items())


def test_micro_batches_make_the_same_update(tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """Rows are drawn by their keys: half of them, the same in each cut, and so are the texts, greedy and drawn."""
    for temperature, cuts in ((0.0, (8, 4, 2, 1)), (0.9, (8, 2))):
        scheme = OnPolicy(student_fraction=0.6, draw="row", temperature=temperature, max_new_tokens=6)
        weights = []
        for rows_per_batch in cuts:
            student = tiny_model(seed=5)
            folder = tmp_path / f"{temperature}-{rows_per_batch}"
            trainer = _trainer(
                student, folder, scheme, _teacher(tiny_model), rows_per_batch=rows_per_batch, max_steps=1
            )
            fit(trainer, folder)
            weights.append(student.model.state_dict())
        for name, weight in weights[0].items():
            for other in weights[1:]:
                torch.testing.assert_close(other[name], weight, atol=1e-4, rtol=1e-3, msg=name)


def _texts(scheme: OnPolicy, student: LoadedModel, *, step: int = 0, seed: int = 17, terms: Any = TERMS) -> list[Any]:
    """Of each row, what the student wrote in it; None where it is the data's."""
    collator = Collator(0, 0 if student.is_encoder_decoder else None)
    moment = Moment(step, step / 4, seed, Objective(terms), collator, student.tokenizer)
    (batch,) = scheme.prepare([collator(ROWS)], student.model, moment)
    pairs = zip(_labels(batch), batch["targets"].tolist(), strict=True)
    return [labels if target >= OWN else None for labels, target in pairs]


def test_texts_are_drawn_by_seed_step_and_row_alone(tiny_model: Callable[..., LoadedModel]) -> None:
    student = tiny_model(seed=3)
    scheme = OnPolicy(student_fraction=1.0, max_new_tokens=6)
    first = _texts(scheme, student)
    assert [text is not None for text in first] == [row.target == "rationale" for row in ROWS]
    torch.manual_seed(99)
    assert _texts(scheme, student) == first, "the global seed draws nothing"
    assert _texts(scheme, student, step=1) != first
    assert _texts(scheme, student, seed=18) != first
    assert student.model.training is False
    student.model.train()
    before = torch.get_rng_state()
    _texts(scheme, student)
    assert student.model.training, "it writes without dropout, and goes on with it"
    assert torch.equal(torch.get_rng_state(), before)


def test_the_share_is_one_of_steps_or_of_rows(tiny_t5: Callable[..., LoadedModel]) -> None:
    student, steps = tiny_t5(seed=3), range(60)
    by_step = OnPolicy(student_fraction=0.3, max_new_tokens=1)
    counts = [sum(text is not None for text in _texts(by_step, student, step=step)) for step in steps]
    assert set(counts) == {0, 4}, "all four rationales of a step, or none"
    assert 9 <= counts.count(4) <= 27
    by_row = OnPolicy(student_fraction=0.3, draw="row", max_new_tokens=1)
    counts = [sum(text is not None for text in _texts(by_row, student, step=step)) for step in steps]
    assert {0, 1, 2} <= set(counts)
    assert 48 <= sum(counts) <= 96
    rising = OnPolicy(student_fraction=Schedule(start=0.0, end=1.0, over=0.5), max_new_tokens=1)
    assert [any(_texts(rising, student, step=step)) for step in (0, 2, 3)] == [False, True, True]


def test_it_writes_only_what_a_teacher_will_judge(tiny_t5: Callable[..., LoadedModel]) -> None:
    student = tiny_t5(seed=3)
    over = [term.at(0.9) for term in TERMS if term.teacher is None]
    assert not any(_texts(ALWAYS, student, terms=over))
    both = Term(name="soft", loss=ForwardKL(), targets=("label", "rationale"), teacher="big")
    written = [text is not None for text in _texts(ALWAYS, student, terms=[both])]
    assert written == [True] * 8
    labels = OnPolicy(student_fraction=1.0, targets=("label",), max_new_tokens=2)
    written = [text is not None for text in _texts(labels, student, terms=[both])]
    assert written == [row.target == "label" for row in ROWS]


def test_a_student_that_writes_nothing_learns_from_its_end(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    student = tiny_model(seed=3)
    head = student.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.size(0)))
    with torch.no_grad():
        head.bias[student.tokenizer.eos_token_id] = 1e4
    trainer = _trainer(student, tmp_path, ALWAYS, _teacher(tiny_model), chunk_tokens=0)
    batches, counts = trainer.get_batch_samples(iter([trainer.collator(ROWS)]), 1, torch.device("cpu"))
    ends = [labels for row, labels in zip(ROWS, _labels(batches[0]), strict=True) if row.target == "rationale"]
    assert ends == [[student.tokenizer.eos_token_id]] * 4
    assert counts.tolist()[1:] == [0, 4]
    assert torch.isfinite(trainer.compute_loss(student.model, batches[0], num_items_in_batch=counts))


def test_a_resume_draws_what_a_whole_training_draws(tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    scheme = OnPolicy(student_fraction=0.5, draw="row", max_new_tokens=6)
    dropout = "attention_dropout" if tiny_model().model.config.model_type == "llama" else "dropout_rate"
    whole, stopped, resumed = (tiny_model(seed=5, **{dropout: 0.2}) for _ in range(3))
    fit(_trainer(whole, tmp_path / "whole", scheme, _teacher(tiny_model)), tmp_path / "whole")
    steps, parts = iter(range(1, 9)), tmp_path / "parts"
    with pytest.raises(Interrupted):
        fit(_trainer(stopped, parts, scheme, _teacher(tiny_model)), parts, stop_when=lambda: next(steps) == 3)
    fit(_trainer(resumed, parts, scheme, _teacher(tiny_model)), parts)
    expected = whole.model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in resumed.model.state_dict().items())


def test_a_teacher_with_a_view_reads_the_new_text_behind_its_own_prompt(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    """And of a row of which it knows nothing the data's text is kept."""
    student, big = tiny_model(seed=3), tiny_model(seed=9)
    rows = [
        replace(row, views={"big": RowView([40, 41, *row.input_ids], row.label_ids, range(len(row.label_ids)))})
        if row.target == "rationale" and row.example != 2
        else row
        for row in ROWS
    ]
    reader = Reader(TeacherView(template="{input}"), big.tokenizer, big.model.config, "")
    width = len(student.tokenizer)
    teachers = {"big": viewed(FrozenTeacher(big.model, width), "big", reader)}
    trainer = _trainer(student, tmp_path, ALWAYS, teachers, rows=rows, chunk_tokens=0)
    (batch,), counts = trainer.get_batch_samples(iter([trainer.collator(rows)]), 1, torch.device("cpu"))
    own = {row.example: ids for row, ids, target in zip(rows, _labels(batch), batch["targets"].tolist(), strict=True)
           if target == RATIONALE + OWN}  # fmt: skip
    assert set(own) == {0, 1, 3}
    assert counts.tolist()[1] == len(ROWS[5].label_ids), "cross-entropy keeps the row that is nobody's"
    said = teachers["big"].signals(batch).of_target(RATIONALE + OWN)
    by_hand = [_logits(big.model, replace(row, input_ids=[40, 41, *row.input_ids]), own[row.example])[:, :width]
               for row in rows if row.target == "rationale" and row.example in own]  # fmt: skip
    torch.testing.assert_close(said.logits, torch.cat(by_hand), atol=1e-5, rtol=1e-4)
    assert said.known is not None
    assert bool(said.known.all())
    assert torch.isfinite(trainer.compute_loss(student.model, batch, num_items_in_batch=counts))


def test_layers_learn_at_the_student_s_own_tokens(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    from distill_llm.models.layers import add_heads

    student, teachers = tiny_t5(seed=3), _teacher(tiny_t5)
    terms = [*TERMS, Term(name="hint", loss=Hint(), targets=("rationale",), teacher="big")]
    add_heads(student.model, {"hint": terms[-1].layers.widths(*_shapes(student, teachers, terms))})  # type: ignore[union-attr]
    trainer = _trainer(student, tmp_path, ALWAYS, teachers, terms=terms)
    batches, counts = trainer.get_batch_samples(iter([trainer.collator(ROWS)]), 1, torch.device("cpu"))
    assert counts[3] == counts[2] == sum(len(_greedy(student.model, row, 6)) for row in ROWS[1::2])
    assert torch.isfinite(trainer.compute_loss(student.model, batches[0], num_items_in_batch=counts))


def _shapes(student: LoadedModel, teachers: Mapping[str, FrozenTeacher], terms: Sequence[Term]) -> tuple[Any, Any]:
    from distill_llm.models.layers import shapes_of

    reading = Objective(terms).reading("big")
    return shapes_of(student.model)["decoder"], teachers["big"].show(reading)["decoder"]


def test_the_logs_say_how_much_it_wrote(tiny_t5: Callable[..., LoadedModel], tmp_path: Path) -> None:
    kept: list[dict[str, float]] = []

    class Keep(TrainerCallback):
        def on_log(self, *ignored: Any, logs: Any = None, **others: Any) -> None:
            kept.append(dict(logs))

    student = tiny_t5(seed=3)
    trainer = _trainer(student, tmp_path, ALWAYS, _teacher(tiny_t5), max_steps=1, rows_per_batch=4, validate_every=1)
    mean = sum(len(_greedy(student.model, row, 6)) for row in ROWS[1::2]) / 4
    trainer.add_callback(Keep())
    trainer.train()
    (logs,) = (one for one in kept if "loss" in one)
    assert logs["student_written"] == 0.5
    assert logs["student_written_tokens"] == pytest.approx(mean)
    assert logs["tokens_rationale"] == 0


def test_weights_that_are_shared_out_are_refused(
    tiny_t5: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    student = tiny_t5(seed=3)
    monkeypatch.setattr("distill_llm.models.parts.is_sharded", lambda model: True)
    with pytest.raises(ConfigError, match=r"shared among processes \(FSDP, DeepSpeed\)"):
        _texts(ALWAYS, student)
