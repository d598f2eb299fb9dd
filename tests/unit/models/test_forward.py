"""A batch's layout: parts and packing change neither losses nor gradients, and take less of a model's time."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BartConfig, BartForConditionalGeneration

from distill_llm.core.errors import ConfigError
from distill_llm.core.features import Reading
from distill_llm.core.layout import DECODER, ENCODER, PACKED, parts_of
from distill_llm.core.signals import select_rows
from distill_llm.data.collate import Collator
from distill_llm.data.rows import Row
from distill_llm.losses.cross_entropy import CrossEntropy
from distill_llm.losses.forward_kl import ForwardKL
from distill_llm.models.attention import set_attention
from distill_llm.models.forward import forward
from distill_llm.models.head import OutputHead
from distill_llm.models.load import LoadedModel
from distill_llm.objective import Objective, Term
from distill_llm.schemes.step_by_step import StepByStep
from distill_llm.teachers.frozen import FrozenTeacher
from distill_llm.training.train import collator_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from distill_llm.core.signals import Batch

ROWS = [
    Row(0, "label", [5, 6, 7, 8, 9], [6, 1], prefix_ids=[3]),
    Row(0, "rationale", [5, 6, 7, 8, 9], [9, 10, 11, 12, 1], agreement=0.5, prefix_ids=[4]),
    Row(0, "rationale", [5, 6, 7, 8, 9], [12, 1], agreement=0.5, prefix_ids=[4]),
    Row(1, "label", [5, 6], [8, 1], prefix_ids=[3]),
    Row(1, "rationale", [5, 6], [9, 1], prefix_ids=[4]),
    Row(2, "rationale", [7, 7, 7], [9, 8, 7, 1], prefix_ids=[4]),
]
TERMS = [
    Term(name="rationale", loss=CrossEntropy(), targets=("rationale",), weight=0.5, row_weight="agreement"),
    Term(name="soft", loss=ForwardKL(), targets=("label",), teacher="big"),
    Term(name="both", loss=ForwardKL(), targets=("label", "rationale"), teacher="big"),
]


def _bart(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 40, "max_position_embeddings": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 1, "dropout": 0.0}
    return BartForConditionalGeneration(BartConfig(**sizes, **heads, **special))


def _t5(tiny: Callable[..., LoadedModel], seed: int) -> Any:
    return tiny(seed=seed, dropout_rate=0.0).model


def _learned(model: Any, teacher: Any, batch: Batch, chunk_tokens: int) -> tuple[Any, dict[str, Any]]:
    """The loss and every gradient."""
    model = copy.deepcopy(model).train()
    objective = Objective(TERMS)
    head = OutputHead(model, chunk_tokens=chunk_tokens) if chunk_tokens else None
    ((said, taught),) = StepByStep().compare(model, {"big": FrozenTeacher(teacher)}, batch, objective, head)
    loss, _ = objective(said, taught, objective.counts(batch))
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def _same(one: tuple[Any, dict[str, Any]], other: tuple[Any, dict[str, Any]]) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-6)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(other[1][name], gradient, rtol=1e-4, atol=2e-6)
    assert sum(gradient.abs().sum() for gradient in one[1].values()) > 1


@pytest.mark.parametrize("part_tokens", [1, 12, 1000])
@pytest.mark.parametrize("chunk_tokens", [0, 3])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_parts_change_neither_loss_nor_gradients(
    family: str, chunk_tokens: int, part_tokens: int, tiny_t5: Callable[..., LoadedModel]
) -> None:
    model, teacher = (_bart(seed) if family == "bart" else _t5(tiny_t5, seed) for seed in (1, 2))
    plain, parted = Collator(0, 0)(ROWS), Collator(0, 0, part_tokens)(ROWS)
    assert parts_of(parted, ENCODER)
    assert not parts_of(plain, ENCODER)
    _same(_learned(model, teacher, plain, chunk_tokens), _learned(model, teacher, parted, chunk_tokens))


def test_the_encoder_reads_each_input_once_and_the_decoder_no_padding(tiny_t5: Callable[..., LoadedModel]) -> None:
    """Three inputs of six rows; labels are not padded to the length of rationales."""
    model = _t5(tiny_t5, 1)
    seen: dict[str, list[Any]] = {"encoder": [], "decoder": []}
    for name, stack in (("encoder", model.get_encoder()), ("decoder", model.get_decoder())):
        stack.dropout.register_forward_hook(lambda _, inputs, __, name=name: seen[name].append(inputs[0].shape[:2]))
    forward(model, Collator(0, 0, 1000)(ROWS))
    assert set(seen["encoder"]) == {(3, 5)}
    assert set(seen["decoder"]) == {(2, 3), (4, 6)}
    seen["decoder"].clear()
    forward(model, Collator(0, 0, 10)(ROWS))
    assert sum(rows * width for rows, width in set(seen["decoder"])) < 2 * 3 + 4 * 6


def test_encoder_states_come_back_by_rows(tiny_t5: Callable[..., LoadedModel]) -> None:
    model = _t5(tiny_t5, 1).eval()
    plain = forward(model, Collator(0, 0)(ROWS), Reading(hidden=frozenset({"encoder", "decoder"})))
    parted = forward(model, Collator(0, 0, 12)(ROWS), Reading(hidden=frozenset({"encoder", "decoder"})))
    batch = Collator(0, 0)(ROWS)
    rows, columns = batch["attention_mask"].nonzero(as_tuple=True)
    for one, other in zip(plain.outputs.encoder_hidden_states, parted.outputs.encoder_hidden_states, strict=True):
        torch.testing.assert_close(other[rows, columns], one[rows, columns])
    rows, columns = (batch["labels"] != -100).nonzero(as_tuple=True)
    for one, other in zip(plain.outputs.decoder_hidden_states, parted.outputs.decoder_hidden_states, strict=True):
        torch.testing.assert_close(parted.at(other, rows, columns), plain.at(one, rows, columns))
    assert forward(model, Collator(0, 0, 12)(ROWS)).outputs.encoder_last_hidden_state is None
    set_attention(model, "eager")
    maps = forward(model, Collator(0, 0, 12)(ROWS), Reading(attention=frozenset({"self"})))
    assert maps.outputs.decoder_attentions[0].shape[0] == len(ROWS)
    assert maps.shape == (6, 6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("chunk_tokens", [0, 3])
def test_packing_changes_neither_loss_nor_gradients(
    attention: str, chunk_tokens: int, tiny_llama: Callable[..., LoadedModel]
) -> None:
    model, teacher = (tiny_llama(seed=seed).model for seed in (1, 2))
    for one in (model, teacher):
        one.set_attn_implementation(attention)
    plain, packed = Collator(0, None)(ROWS), Collator(0, None, packs=True)(ROWS)
    sizes = []
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: sizes.append(tuple(inputs[0].shape)))
    _same(_learned(model, teacher, plain, chunk_tokens), _learned(model, teacher, packed, chunk_tokens))
    assert sizes == [(6, 10), (1, sum(row.num_tokens - len(row.prefix_ids) for row in ROWS))]


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 4}),
        ("mamba", {"hidden_size": 16, "num_hidden_layers": 2}),
    ],
)
def test_a_model_that_mixes_packed_rows_is_refused(
    model_type: str, sizes: dict[str, Any], tiny_llama: Callable[..., LoadedModel]
) -> None:
    """One has no positions, the other no attention; padded, both can be trained."""
    tokenizer = tiny_llama().tokenizer
    config = AutoConfig.for_model(model_type, vocab_size=40, **sizes)
    student = LoadedModel(AutoModelForCausalLM.from_config(config), tokenizer)
    with pytest.raises(ConfigError, match=r"train\.packing: \w+ cannot read several rows as one sequence"):
        collator_for(student, packing="always")
    assert not collator_for(student, packing="auto").packs


def test_rows_are_packed_where_it_is_asked_for_or_pays(
    tiny_llama: Callable[..., LoadedModel], tiny_t5: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama, t5 = tiny_llama(), tiny_t5()
    assert collator_for(llama, packing="always").packs
    assert not collator_for(llama, packing="auto").packs, "sdpa computes what it masks"
    assert collator_for(t5, packing="auto").part_tokens > 0
    assert collator_for(t5, packing="never").part_tokens == 0
    monkeypatch.setattr("distill_llm.training.train.check_packing", lambda model: None)
    for attention in ("flash_attention_2", "flex_attention"):
        monkeypatch.setattr(llama.model.config, "_attn_implementation_internal", attention)
        assert collator_for(llama, packing="auto").packs
        assert not collator_for(llama, packing="never").packs


@pytest.mark.parametrize("keep", [[True, False, True, False, False, True], [False, True, True, False, False, False]])
@pytest.mark.parametrize("collate", [Collator(0, 0, 2048), Collator(0, None, packs=True)])
def test_selected_rows_have_the_layout_that_they_would_have_alone(collate: Collator, keep: list[bool]) -> None:
    got = select_rows(collate(ROWS), torch.tensor(keep))
    expected = collate([row for row, kept in zip(ROWS, keep, strict=True) if kept])
    assert got.keys() == expected.keys()
    for name, column in expected.items():
        assert got[name].tolist() == column.tolist(), name
    assert (PACKED in got) == collate.packs
    assert bool(parts_of(got, DECODER)) != collate.packs


def test_a_batch_that_would_gain_nothing_has_no_layout() -> None:
    labels = [row for row in ROWS if row.target == "label"]
    assert not parts_of(Collator(0, 0, 2048)(labels), ENCODER)
    part = select_rows(Collator(0, 0, 2048)(ROWS), torch.tensor([False] * 6))
    assert not parts_of(part, ENCODER)
