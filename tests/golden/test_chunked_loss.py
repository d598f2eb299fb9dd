"""The loss in chunks is the loss of all logits at once: values and gradients, for heads and models of many kinds."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from distill_llm.core.processes import leave_in_time
from distill_llm.core.signals import LazySignals, model_inputs
from distill_llm.data.collate import Collator
from distill_llm.data.rows import Row
from distill_llm.losses.cross_entropy import CrossEntropy
from distill_llm.losses.forward_kl import ForwardKL
from distill_llm.losses.hint import Hint
from distill_llm.losses.jensen_shannon import JensenShannon
from distill_llm.models.head import OutputHead
from distill_llm.models.layers import add_heads, anchor_of
from distill_llm.objective import Objective, Term
from distill_llm.schemes.step_by_step import StepByStep
from distill_llm.teachers.ema import EmaTeacher
from distill_llm.teachers.frozen import FrozenTeacher

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from distill_llm.core.signals import Batch, Signals

WORDS = 48
DECODER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
}
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0}
BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "dropout": 0.0,
}
MODELS: dict[str, dict[str, Any]] = {
    "t5-tied-scaled": {"model_type": "t5", **T5, "tie_word_embeddings": True, "scale_decoder_outputs": True},
    "t5-untied": {"model_type": "t5", **T5, "tie_word_embeddings": False, "scale_decoder_outputs": False},
    "t5-untied-scaled": {"model_type": "t5", **T5, "tie_word_embeddings": False, "scale_decoder_outputs": True},
    "llama": {"model_type": "llama", **DECODER},
    "llama-tied": {"model_type": "llama", **DECODER, "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", **DECODER, "final_logit_softcapping": 0.5},
    "cohere": {"model_type": "cohere", **DECODER, "logit_scale": 0.0625},
    "granite": {"model_type": "granite", **DECODER, "logits_scaling": 7.0},
    "bart": {"model_type": "bart", **BART},
    "marian": {"model_type": "marian", **BART, "decoder_vocab_size": WORDS},
}
ROWS = [
    Row(0, "rationale", [5, 9], [9, 10, 11, 12, 13, 1], agreement=0.75),
    Row(0, "label", [5, 6, 7], [8, 1]),
    Row(1, "rationale_then_label", [5, 6], [9, 8, 20, 1]),
    Row(1, "label", [5, 6], [1]),
    Row(2, "rationale", [7], [14, 15, 1], agreement=0.5),
]
OBJECTIVE = Objective(
    [
        Term(name="label", loss=CrossEntropy(), targets=("label",)),
        Term(name="rationale", loss=CrossEntropy(), targets=("rationale",), weight=0.5, row_weight="agreement"),
        Term(name="soft", loss=ForwardKL(temperature=2.0), targets=("label", "rationale"), teacher="big", weight=0.7),
        Term(name="mixed", loss=JensenShannon(), targets=("rationale",), teacher="big", weight=0.3),
    ]
)
"""No term looks at ``rationale_then_label``; the teacher is not asked about it."""
TOKENS = 12  # of rows that some term looks at
CHUNKS = (1, 7, TOKENS, 1000)


def _model(name: str, seed: int = 1, **changes: Any) -> Any:
    sizes = MODELS[name] | changes
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = AutoConfig.for_model(**{"vocab_size": WORDS, **special, **sizes})
    if config.is_encoder_decoder:
        config.decoder_start_token_id = 0
    torch.manual_seed(seed)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_config(config).float()
    with torch.no_grad():
        for weight in model.parameters():  # far from where all logits are alike, and caps do nothing
            weight.add_(torch.randn_like(weight) * 0.2)
        if "bart" in name or "marian" in name:
            model.final_logits_bias.normal_()
    return model


def _batch(model: Any, rows: Sequence[Row] = ROWS, *, laid_out: bool = False) -> Batch:
    start = 0 if model.config.is_encoder_decoder else None
    return Collator(0, start, part_tokens=8 * laid_out, packs=laid_out)(rows)


Outcome = tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]


def _outcome(
    model: Any, teacher: Any, chunk_tokens: int, batches: Sequence[Batch], objective: Objective = OBJECTIVE
) -> Outcome:
    """Loss, means and gradients, summed over the batches of one step."""
    model.zero_grad()
    head = OutputHead(model, chunk_tokens=chunk_tokens) if chunk_tokens else None
    counts = torch.stack([objective.counts(batch) for batch in batches]).sum(0)
    total, sums = torch.zeros(()), dict.fromkeys([term.name for term in objective.terms], torch.zeros(()))
    for batch in batches:
        ((said, taught),) = StepByStep().compare(model, {"big": teacher}, batch, objective, head)
        assert isinstance(said, LazySignals) == bool(chunk_tokens)
        loss, means = objective(said, taught, counts)
        loss.backward()
        total = total + loss.detach()
        sums = {name: value + means[name] for name, value in sums.items()}
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return total, sums, {name: gradient.clone() for name, gradient in gradients.items()}


def _assert_same(found: Outcome, expected: Outcome, atol: float = 2e-6) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=atol)
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-4, atol=atol)


@pytest.mark.parametrize("name", MODELS)
def test_each_kind_of_head_gives_the_loss_and_gradients_of_all_logits_at_once(name: str) -> None:
    model, teacher = _model(name), FrozenTeacher(_model(name, seed=2))
    batch = _batch(model)
    expected = _outcome(model, teacher, 0, [batch])
    assert expected[0] > 0.5
    assert all(mean > 1e-4 for mean in expected[1].values())
    for chunk_tokens in CHUNKS:
        _assert_same(_outcome(model, teacher, chunk_tokens, [batch]), expected)


@pytest.mark.parametrize("name", ["t5-tied-scaled", "llama"])
def test_micro_batches_of_a_step_add_up(name: str) -> None:
    """One has no row that a term looks at, one no row for the teacher."""
    model, teacher = _model(name), FrozenTeacher(_model(name, seed=2))
    everything = _outcome(model, teacher, 0, [_batch(model)])
    parts = [_batch(model, ROWS[:2]), _batch(model, ROWS[2:3]), _batch(model, ROWS[3:])]
    _assert_same(_outcome(model, teacher, 3, parts), everything)


def test_a_batch_without_a_token_of_any_term_gives_every_weight_a_gradient_of_zero() -> None:
    """Or the processes of a training would wait for each other for ever."""
    model, teacher = _model("llama"), FrozenTeacher(_model("llama", seed=2))
    loss, means, gradients = _outcome(model, teacher, 3, [_batch(model, ROWS[2:3])])
    assert loss == 0
    assert all(mean == 0 for mean in means.values())
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    assert all(gradient.abs().max() == 0 for gradient in gradients.values())


@pytest.mark.parametrize("name", ["t5-tied-scaled", "t5-untied", "llama", "cohere"])
@pytest.mark.parametrize("modules", ["all-linear", "with-head"])
def test_adapters_learn_the_same(name: str, modules: str) -> None:
    """Adapters on every linear layer, and on the head too."""
    from peft import LoraConfig, get_peft_model

    model, teacher = _model(name), FrozenTeacher(_model(name, seed=2))
    layers = {"t5": ["q", "v", "o", "wi", "wo"]}.get(model.config.model_type, ["q_proj", "v_proj", "up_proj"])
    chosen = "all-linear" if modules == "all-linear" else [*layers, "lm_head"]
    student = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=chosen, init_lora_weights=False))
    expected = _outcome(student, teacher, 0, [_batch(model)])
    assert any("lm_head" in name for name in expected[2]) == (modules == "with-head")
    assert all("lora_" in name for name in expected[2])
    for chunk_tokens in CHUNKS:
        _assert_same(_outcome(student, teacher, chunk_tokens, [_batch(model)]), expected)


@pytest.mark.parametrize("head_too", [False, True], ids=["full-head", "4bit-head"])
def test_a_student_of_four_bits_learns_the_same(head_too: bool) -> None:
    """Its adapters do, beside a teacher of four bits; sizes are those that the kernels take."""
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes: pip install 'distill-llm[quantize]'")
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig, get_peft_model

    def four_bits(seed: int) -> Any:
        model = _model("llama", seed=seed, hidden_size=64, intermediate_size=64, head_dim=16, vocab_size=64)
        for parent in [part for part in model.modules() if not isinstance(part, torch.nn.Linear)]:
            for name, layer in list(parent.named_children()):
                if isinstance(layer, torch.nn.Linear) and (head_too or name != "lm_head"):
                    small = Linear4bit(
                        layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
                    )
                    small.load_state_dict(layer.state_dict())
                    setattr(parent, name, small)
        return model.to("cpu")

    student, teacher = four_bits(1), FrozenTeacher(four_bits(2))
    assert isinstance(student.lm_head, Linear4bit) == head_too
    targets = ["q_proj", "v_proj", "down_proj", *(["lm_head"] if head_too else [])]
    student = get_peft_model(student, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    expected = _outcome(student, teacher, 0, [_batch(student)])
    assert expected[0] > 0.5
    for chunk_tokens in CHUNKS:
        _assert_same(_outcome(student, teacher, chunk_tokens, [_batch(student)]), expected, atol=2e-5)


@pytest.mark.parametrize("words", [(64, 80), (80, 64)], ids=str)
def test_heads_padded_to_different_widths_are_compared_over_the_tokenizers_words(words: tuple[int, int]) -> None:
    student, big = (_model("llama", seed, vocab_size=width) for seed, width in zip((1, 2), words, strict=True))
    with torch.no_grad():
        big.lm_head.weight[WORDS:] += 9.0  # loud, so that it would be heard
    teacher = FrozenTeacher(big, WORDS)
    _assert_same(_outcome(student, teacher, 5, [_batch(student)]), _outcome(student, teacher, 0, [_batch(student)]))


class Ready:
    """A teacher that gives all its logits at once, and counts how often."""

    def __init__(self, model: Any):
        self._teacher, self.asked = FrozenTeacher(model), 0

    def signals(self, batch: Batch) -> Signals:
        self.asked += 1
        return self._teacher.signals(batch)


def test_a_teacher_with_ready_logits_is_heard_in_chunks_too() -> None:
    model, teacher = _model("t5-untied"), Ready(_model("t5-untied", seed=2))
    expected = _outcome(model, teacher, 0, [_batch(model)])
    _assert_same(_outcome(model, teacher, 4, [_batch(model)]), expected)
    assert teacher.asked == 2


def test_in_bfloat16_the_head_computes_as_the_rest_does() -> None:
    """Under autocast of the forward pass alone, as accelerate does it: the error is no larger than that of all logits
    at once, against float32."""
    model, teacher = _model("llama"), FrozenTeacher(_model("llama", seed=2))
    exact = _outcome(model, teacher, 0, [_batch(model)])
    forward = model.forward

    def in_bfloat16(*arguments: Any, **options: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = forward(*arguments, **options)
        return outputs

    model.forward = in_bfloat16
    whole, chunked = (_outcome(model, teacher, size, [_batch(model)]) for size in (0, 5))

    def distance(outcome: Outcome) -> float:
        return sum((outcome[2][name] - exact[2][name]).square().sum().item() for name in exact[2]) ** 0.5

    batch = _batch(model)
    lazy = OutputHead(model).read(model, batch)
    logits = lazy.said(0, len(lazy.hidden), lazy.hidden).logits
    assert logits.dtype == torch.bfloat16
    everything = model(**model_inputs(batch)).logits[lazy.tokens.rows, lazy.tokens.columns]
    torch.testing.assert_close(logits, everything, rtol=0, atol=0)
    assert distance(whole) > 1e-4, "it was not in bfloat16"
    assert 1e-4 < distance(chunked) < 1.2 * distance(whole)
    torch.testing.assert_close(chunked[0], whole[0], rtol=2e-3, atol=0)


def test_no_tensor_of_all_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix product of student and teacher with their heads has as many rows as a chunk, or as the probe."""
    seen: list[int] = []
    linear = torch.nn.functional.linear

    def noted(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight.size(0) == WORDS:
            seen.append(inputs.numel() // inputs.size(-1))
        return linear(inputs, weight, bias)

    model, teacher = _model("llama"), FrozenTeacher(_model("llama", seed=2))
    monkeypatch.setattr(torch.nn.functional, "linear", noted)
    _outcome(model, teacher, 5, [_batch(model)])
    assert max(seen) == 5
    seen.clear()
    _outcome(model, teacher, 0, [_batch(model)])
    assert max(seen) == _batch(model)["input_ids"].numel()


def test_without_gradients_the_loss_is_the_same() -> None:
    model, teacher = _model("gemma2"), FrozenTeacher(_model("gemma2", seed=2))
    batch = _batch(model)
    expected = _outcome(model, teacher, 0, [batch])[0]
    with torch.no_grad():
        head = OutputHead(model, chunk_tokens=5)
        ((said, taught),) = StepByStep().compare(model, {"big": teacher}, batch, OBJECTIVE, head)
        torch.testing.assert_close(OBJECTIVE(said, taught, OBJECTIVE.counts(batch))[0], expected)


def test_dropout_on_the_head_is_drawn_for_each_chunk_and_the_gradient_is_that_of_the_draw() -> None:
    """A loss that is linear in the head's output has a gradient that tells which inputs were dropped."""
    from peft import LoraConfig, get_peft_model

    model = _model("llama")
    config = LoraConfig(r=4, target_modules=["lm_head"], lora_dropout=0.5, init_lora_weights=False)
    student = get_peft_model(model, config).train()
    objective, teacher = Objective(OBJECTIVE.terms[:2]), FrozenTeacher(_model("llama", seed=2))
    batch = _batch(student)
    torch.manual_seed(3)
    gradients = _outcome(student, teacher, 1000, [batch], objective)[2]
    name, weight = next((n, w) for n, w in student.named_parameters() if "lora_B" in n)
    step = 1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * step)
        torch.manual_seed(3)
        values.append(_outcome(student, teacher, 1000, [batch], objective)[0])
        with torch.no_grad():
            weight.sub_(sign * step)
    torch.testing.assert_close((values[0] - values[1]) / 2, (gradients[name] * step).sum(), rtol=2e-2, atol=1e-5)


STEPS = ((ROWS[:2], ROWS[2:3]), (ROWS[2:4], ROWS[4:]), (ROWS[4:], ROWS[:4]))
"""Of each step, the rows of each of two processes. In the first, the second process has no token of any term."""
PROCESS = """
import importlib.util, sys
import torch, torch.distributed as dist
spec = importlib.util.spec_from_file_location("chunked", sys.argv[1])
chunked = importlib.util.module_from_spec(spec)
sys.modules["chunked"] = chunked
spec.loader.exec_module(chunked)
chunked.train_in_processes(*sys.argv[2:])
"""


SHARED = Objective(
    [
        *OBJECTIVE.terms,
        Term(name="own", loss=ForwardKL(), targets=("label",), teacher="own"),
        Term(name="hint", loss=Hint(), targets=("label", "rationale"), teacher="wide", weight=0.1),
    ]
)
"""With an average of the student's weights, which processes may have shared out, and a head learned beside it."""


def _student(name: str) -> tuple[Any, dict[str, Any]]:
    """A student with its head, and its teachers, before it is wrapped."""
    model = _model(name)
    sizes = {"d_model": 24} if model.config.is_encoder_decoder else {"hidden_size": 24}
    teachers = {"own": EmaTeacher(model, decay=0.5), "big": FrozenTeacher(_model(name, seed=2))}
    torch.manual_seed(4)
    add_heads(model, {"hint": [(16, 24)]})
    return model, teachers | {"wide": FrozenTeacher(_model(name, seed=3, **sizes))}


def _steps(model: Any, teachers: dict[str, Any], chunk_tokens: int, rank: int | None, wrapped: Any = None) -> None:
    """Three steps of plain descent; ``rank`` None: all rows in this process."""
    wrapped = model if wrapped is None else wrapped
    head = OutputHead(wrapped, chunk_tokens=chunk_tokens) if chunk_tokens else None
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.5)
    for number, shares in enumerate(STEPS, start=1):
        whole = _batch(model, [row for share in shares for row in share])
        batch = whole if rank is None else _batch(model, shares[rank], laid_out=True)
        ((said, taught),) = StepByStep().compare(wrapped, teachers, batch, SHARED, head)
        loss, _ = SHARED(said, taught, SHARED.counts(whole))
        loss = loss + anchor_of(wrapped)
        (loss if rank is None else 2 * loss).backward()  # undoes the mean over processes
        optimizer.step()
        optimizer.zero_grad()
        teachers["own"].after_step(wrapped, number)


def train_in_processes(way: str, name: str, folder: str) -> None:
    """What each process of ``torchrun`` does; the first one saves the weights."""
    import torch.distributed as processes
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    processes.init_process_group("gloo")
    leave_in_time()
    model, teachers = _student(name)
    wrapped = model
    if way == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        layers = model.encoder.block if model.config.is_encoder_decoder else model.model.layers
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        if way == "fsdp-head":
            fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=True if way == "fsdp-resharded" else None)
    _steps(model, teachers, 3, processes.get_rank(), wrapped)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if processes.get_rank() == 0:
        torch.save(state, f"{folder}/weights.pt")
    processes.barrier()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "name"),
    [
        ("ddp", "llama"),
        ("ddp", "t5-tied-scaled"),
        ("fsdp", "llama"),
        ("fsdp", "t5-tied-scaled"),
        ("fsdp-resharded", "llama"),
        ("fsdp-head", "llama"),
    ],
)
def test_two_processes_learn_what_one_learns_from_all_logits(
    way: str, name: str, launch: Callable[..., Any], tmp_path: Path
) -> None:
    """In parts or packed, against padded rows. ``fsdp`` shards the head with the root, as accelerate does; the others
    take its weights away after the forward pass, with the root's or as a unit of its own."""
    model, teachers = _student(name)
    fresh = copy.deepcopy(model.state_dict())
    _steps(model, teachers, 0, None)
    expected = model.state_dict()
    (tmp_path / "process.py").write_text(PROCESS)
    launch("process.py", __file__, way, name, str(tmp_path), timeout=200, CUDA_VISIBLE_DEVICES="")
    found = torch.load(tmp_path / "weights.pt")
    assert found.keys() == expected.keys()
    torch.testing.assert_close(dict(found), dict(expected), rtol=1e-4, atol=2e-5)
    for part in ("lm_head", "hint_heads"):
        assert any((expected[key] - fresh[key]).abs().max() > 1e-2 for key in expected if part in key), part


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_training_in_chunks_learns_the_same_and_resumes_to_the_bit(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Through the recipe's setting; resumed with dropout on the adapters of the head."""
    from transformers import set_seed

    from distill_llm.core.errors import Interrupted
    from distill_llm.models.load import LoadedModel
    from distill_llm.models.lora import add_lora
    from distill_llm.models.spec import LoraSpec
    from distill_llm.recipe.train import TrainSpec
    from distill_llm.training.train import fit, make_trainer

    build = request.getfixturevalue(f"tiny_{family}")
    rows = [replace(row, example=4 * turn + row.example) for turn in range(4) for row in ROWS]

    def trained(name: str, chunk_tokens: Any, dropout: float = 0.0, stop_at: int = 0) -> dict[str, torch.Tensor]:
        set_seed(17)
        student = build(seed=5)
        spec = LoraSpec(rank=4, modules=("lm_head",), dropout=dropout)
        adapted = LoadedModel(add_lora(student.model, spec), student.tokenizer)
        keys = {"max_steps": 4, "rows_per_step": 4, "rows_per_batch": 2, "learning_rate": 1e-2, "validate_every": 2}
        trainer = make_trainer(
            adapted,
            rows,
            spec=TrainSpec.model_validate(keys | {"chunk_tokens": chunk_tokens}),
            max_steps=4,
            scheme=StepByStep(),
            objective=OBJECTIVE,
            teachers={"big": FrozenTeacher(build(seed=8).model)},
            validate=None,
            folder=tmp_path / name,
            seed=17,
        )
        steps = iter(range(1, 100))
        fit(trainer, tmp_path / name, stop_when=lambda: next(steps) == stop_at)
        return {key: weight.detach().clone() for key, weight in adapted.model.named_parameters() if "lora_" in key}

    whole, chunked = trained("whole", 0), trained("chunked", 3)
    torch.testing.assert_close(chunked, whole, rtol=1e-3, atol=1e-5)
    straight = trained("straight", 3, dropout=0.3)
    assert any((straight[key] - chunked[key]).abs().max() > 1e-4 for key in straight), "dropout was drawn"
    with pytest.raises(Interrupted):
        trained("parts", 3, dropout=0.3, stop_at=2)
    resumed = trained("parts", 3, dropout=0.3)
    assert all(torch.equal(resumed[key], straight[key]) for key in straight)
