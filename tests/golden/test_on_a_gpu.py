"""On a CUDA device: what a CPU computes, in chunks, in parts, packed, sharded, in bfloat16 and in few bits."""

from __future__ import annotations

import copy
import importlib.util
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, set_seed

from distill_llm.data.collate import Collator
from distill_llm.data.rows import Row
from distill_llm.losses.cross_entropy import CrossEntropy
from distill_llm.losses.forward_kl import ForwardKL
from distill_llm.losses.hint import Hint
from distill_llm.losses.jensen_shannon import JensenShannon
from distill_llm.losses.total_variation import TotalVariation
from distill_llm.models.attention import prepare_flex
from distill_llm.models.head import OutputHead
from distill_llm.models.layers import add_heads, anchor_of
from distill_llm.models.load import LoadedModel
from distill_llm.objective import Objective, Term
from distill_llm.recipe.train import TrainSpec
from distill_llm.schemes.step_by_step import StepByStep
from distill_llm.teachers.ema import EmaTeacher
from distill_llm.teachers.frozen import FrozenTeacher
from distill_llm.training.train import collator_for, fit, make_trainer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU = "cuda"
WORDS = 64
DECODER = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "t5": {"model_type": "t5", **T5, "tie_word_embeddings": True, "scale_decoder_outputs": True},
    "llama": {"model_type": "llama", **DECODER},
    "gemma2": {"model_type": "gemma2", **DECODER, "final_logit_softcapping": 0.5},
    "qwen3": {"model_type": "qwen3", **DECODER, "tie_word_embeddings": True},
}
ROWS = [
    Row(0, "rationale", [5, 9], [9, 10, 11, 12, 13, 1], agreement=0.75),
    Row(0, "label", [5, 6, 7], [8, 1]),
    Row(1, "rationale", [5, 6, 11, 4], [9, 8, 20, 1]),
    Row(1, "label", [5, 6], [1]),
    Row(2, "rationale", [7], [14, 15, 1], agreement=0.5),
]
OBJECTIVE = Objective(
    [
        Term(name="label", loss=CrossEntropy(), targets=("label",)),
        Term(name="rationale", loss=CrossEntropy(), targets=("rationale",), weight=0.5, row_weight="agreement"),
        Term(name="soft", loss=ForwardKL(temperature=2.0), targets=("label", "rationale"), teacher="big", weight=0.7),
        Term(name="mixed", loss=JensenShannon(), targets=("rationale",), teacher="big", weight=0.3),
        Term(name="apart", loss=TotalVariation(), targets=("label",), teacher="big"),
    ]
)


def _model(name: str, seed: int = 1, **changes: Any) -> Any:
    special = {"vocab_size": WORDS, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = AutoConfig.for_model(**special | MODELS[name] | changes)
    if config.is_encoder_decoder:
        config.decoder_start_token_id = 0
    set_seed(seed)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_config(config).float()
    with torch.no_grad():
        for weight in model.parameters():  # far from where all logits are alike
            weight.add_(torch.randn_like(weight) * 0.1)
    return model


Outcome = tuple[torch.Tensor, dict[str, torch.Tensor]]


def _outcome(model: Any, teacher: Any, chunk_tokens: int, *, laid_out: bool, autocast: bool = False) -> Outcome:
    """Loss and gradients on the CPU, wherever they were computed; copies, as a model takes its gradients along."""
    model.zero_grad()
    start = 0 if model.config.is_encoder_decoder else None
    batch = Collator(0, start, part_tokens=8 * laid_out, packs=laid_out)(ROWS)
    batch = {name: column.to(model.device) for name, column in batch.items()}
    head = OutputHead(model, chunk_tokens=chunk_tokens) if chunk_tokens else None
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=autocast):
        ((said, taught),) = StepByStep().compare(model, {"big": teacher}, batch, OBJECTIVE, head)
    loss, _ = OBJECTIVE(said, taught, OBJECTIVE.counts(batch))
    assert loss.dtype == torch.float32
    loss.backward()
    found = {name: weight.grad.cpu().clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return loss.detach().cpu(), found


def _distance(one: Outcome, other: Outcome) -> float:
    """Between gradients, over the size of ``other``."""
    assert one[1].keys() == other[1].keys()
    apart = sum((one[1][name] - wanted).square().sum().item() for name, wanted in other[1].items()) ** 0.5
    return apart / sum(wanted.square().sum().item() for wanted in other[1].values()) ** 0.5


@pytest.mark.parametrize("laid_out", [False, True], ids=["padded", "laid-out"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_a_cpu(name: str, laid_out: bool) -> None:
    """All logits at once and padded there; here in chunks, in parts or packed."""
    model, big = _model(name), _model(name, seed=2)
    expected = _outcome(model, FrozenTeacher(copy.deepcopy(big)), 0, laid_out=False)
    assert expected[0] > 0.5
    model, teacher = model.to(GPU), FrozenTeacher(big.to(GPU))
    for chunk_tokens in (0, 1, 5, 1000):
        found = _outcome(model, teacher, chunk_tokens, laid_out=laid_out)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
        assert _distance(found, expected) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_as_near_in_chunks_as_with_all_logits_at_once(name: str) -> None:
    model, teacher = _model(name).to(GPU), FrozenTeacher(_model(name, seed=2).to(GPU))
    exact = _outcome(model, teacher, 0, laid_out=False)
    whole, chunked = (_outcome(model, teacher, size, laid_out=False, autocast=True) for size in (0, 5))
    assert 1e-4 < _distance(whole, exact) < 0.1
    assert 1e-4 < _distance(chunked, exact) < 1.3 * _distance(whole, exact)


@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_rows_are_packed_for_attention_that_skips_what_is_masked(name: str, attention: str) -> None:
    """`auto` packs them; loss and gradients are those of padded rows under sdpa, as far as bfloat16 tells."""
    if attention.startswith("flash") and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash attention is not installed")
    model, big = _model(name).to(GPU), _model(name, seed=2).to(GPU)
    exact = _outcome(model, FrozenTeacher(big), 0, laid_out=False)
    padded = _outcome(model, FrozenTeacher(big), 0, laid_out=False, autocast=True)
    for one in (model, big):
        if attention == "flex_attention":
            prepare_flex(one, where="student")
        one.set_attn_implementation(attention)
    tokenizer = type("Tokenizer", (), {"pad_token_id": 0})
    assert collator_for(LoadedModel(model, tokenizer)).packs
    packed = _outcome(model, FrozenTeacher(big), 5, laid_out=True, autocast=True)
    torch.testing.assert_close(packed[0], exact[0], rtol=2e-2, atol=0)
    assert _distance(packed, exact) < 0.03 + 2 * _distance(padded, exact)


@pytest.mark.parametrize("head_too", [False, True], ids=["full-head", "4bit-head"])
def test_a_student_of_four_bits_learns_the_same_in_chunks(head_too: bool) -> None:
    """Its adapters do, beside a teacher of four bits."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig, get_peft_model

    def four_bits(seed: int) -> Any:
        model = _model("llama", seed)
        for parent in [part for part in model.modules() if not isinstance(part, torch.nn.Linear)]:
            for name, layer in list(parent.named_children()):
                if isinstance(layer, torch.nn.Linear) and (head_too or name != "lm_head"):
                    small = Linear4bit(
                        layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
                    )
                    small.load_state_dict(layer.state_dict())
                    setattr(parent, name, small)
        return model.to(GPU)

    student, teacher = four_bits(1), FrozenTeacher(four_bits(2))
    assert isinstance(student.lm_head, Linear4bit) == head_too
    targets = ["q_proj", "v_proj", "down_proj", *(["lm_head"] if head_too else [])]
    student = get_peft_model(student, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    for laid_out in (False, True):
        expected = _outcome(student, teacher, 0, laid_out=laid_out)
        assert expected[0] > 0.5
        for chunk_tokens in (1, 5, 1000):
            found = _outcome(student, teacher, chunk_tokens, laid_out=laid_out)
            torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-4)
            assert _distance(found, expected) < 1e-3


SHARED = Objective(
    [
        *OBJECTIVE.terms,
        Term(name="own", loss=ForwardKL(), targets=("label",), teacher="own"),
        Term(name="hint", loss=Hint(), targets=("label", "rationale"), teacher="wide", weight=0.1),
    ]
)
PROCESS = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("on_a_gpu", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["on_a_gpu"] = module
spec.loader.exec_module(module)
module.train_sharded(*sys.argv[2:])
"""


def _steps(model: Any, teachers: dict[str, Any], wrapped: Any, chunk_tokens: int, device: str) -> None:
    """Three steps of plain descent."""
    head = OutputHead(wrapped, chunk_tokens=chunk_tokens) if chunk_tokens else None
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.2)
    batch = Collator(0, 0 if model.config.is_encoder_decoder else None)(ROWS)
    batch = {name: column.to(device) for name, column in batch.items()}
    for number in range(1, 4):
        ((said, taught),) = StepByStep().compare(wrapped, teachers, batch, SHARED, head)
        loss, _ = SHARED(said, taught, SHARED.counts(batch))
        (loss + anchor_of(wrapped)).backward()
        optimizer.step()
        optimizer.zero_grad()
        teachers["own"].after_step(wrapped, number)


def _student(name: str, device: str) -> tuple[Any, dict[str, Any]]:
    """A student with a head for hints, and its teachers, before it is wrapped."""
    model = _model(name)
    set_seed(4)
    add_heads(model, {"hint": [(64, 32)]})
    model.to(device)
    teachers: dict[str, Any] = {"own": EmaTeacher(model, decay=0.5)}
    teachers["big"] = FrozenTeacher(_model(name, seed=2).to(device))
    narrow = {"d_model": 32} if name == "t5" else {"hidden_size": 32}
    return model, teachers | {"wide": FrozenTeacher(_model(name, seed=3, **narrow).to(device))}


def train_sharded(way: str, name: str, folder: str) -> None:
    """What the process of ``torchrun`` does."""
    import torch.distributed as processes
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.cuda.set_device(0)
    processes.init_process_group("nccl")
    model, teachers = _student(name, GPU)
    wrapped = model
    if way == "ddp":
        wrapped = DistributedDataParallel(model, device_ids=[0])
    else:
        mesh = init_device_mesh(GPU, (1,))
        for layer in model.encoder.block if name == "t5" else model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=True if way == "fsdp-resharded" else None)
    _steps(model, teachers, wrapped, 3, GPU)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    torch.save({key: value.cpu() for key, value in state.items()}, f"{folder}/weights.pt")
    processes.destroy_process_group()


@pytest.mark.parametrize("way", ["ddp", "fsdp", "fsdp-resharded"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_wrapped_student_learns_in_chunks_what_a_cpu_learns_from_all_logits(
    way: str, name: str, launch: Callable[..., Any], tmp_path: Path
) -> None:
    """One process under nccl, DDP and FSDP2; with an average of the student's weights and a head that is learned."""
    model, teachers = _student(name, "cpu")
    fresh = copy.deepcopy(model.state_dict())
    _steps(model, teachers, model, 0, "cpu")
    expected = model.state_dict()
    (tmp_path / "process.py").write_text(PROCESS)
    launch("process.py", __file__, way, name, str(tmp_path), processes=1, timeout=200)
    found = torch.load(tmp_path / "weights.pt")
    assert found.keys() == expected.keys()
    torch.testing.assert_close(dict(found), dict(expected), rtol=1e-3, atol=1e-4)
    for part in ("lm_head", "hint_heads"):  # or nothing would be shown of them
        assert any((expected[key] - fresh[key]).abs().max() > 1e-3 for key in expected if part in key), part


@pytest.mark.parametrize("teacher_on", ["cpu", GPU])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_cuts_and_precision_make_the_same_training(
    family: str, teacher_on: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """float32 in 1, 2 and 8 micro-batches: one result. bfloat16, which `auto` chooses here: about that."""
    from distill_llm.training.precision import choose_precision

    build: Callable[..., LoadedModel] = request.getfixturevalue(f"tiny_{family}")
    rows = [row for turn in range(4) for row in ROWS[:4]]

    def trained(name: str, **keys: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
        set_seed(17)
        student = build(seed=5)
        student.model.to(GPU)
        teachers = {"big": FrozenTeacher(build(seed=8).model.to(teacher_on))}
        spec = {"max_steps": 6, "rows_per_step": 8, "rows_per_batch": 8, "learning_rate": 2e-2, "validate_every": 6}
        spec |= {"optimizer": "adafactor"}
        asked = TrainSpec.model_validate(spec | keys)
        assert choose_precision(asked.precision, student.model).bfloat16 == (asked.precision != "float32")
        trainer = make_trainer(
            student,
            rows,
            spec=asked,
            max_steps=6,
            scheme=StepByStep(),
            objective=OBJECTIVE,
            teachers=teachers,
            validate=None,
            folder=tmp_path / name,
            seed=17,
        )
        trainer.args.logging_steps = 1
        fit(trainer, tmp_path / name)
        logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return {key: value.cpu().float() for key, value in student.model.state_dict().items()}, logs

    weights, losses = trained("whole", precision="float32")
    assert len(losses) == 6
    assert losses[-1] < 0.95 * losses[0]
    for cut in (4, 1):
        others, _ = trained(str(cut), precision="float32", rows_per_batch=cut)
        for key, value in weights.items():
            torch.testing.assert_close(others[key], value, rtol=1e-3, atol=1e-4)
    rough, about = trained("bfloat16")
    assert about == pytest.approx(losses, rel=0.05)
    assert any(not torch.equal(rough[key], value) for key, value in weights.items())
