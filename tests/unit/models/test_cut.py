"""Smaller models out of larger ones: exact where nothing is lost, ordinary when saved, and refused where unknown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from distill_llm.core.errors import ConfigError
from distill_llm.models.anatomy import family_of, weights_in
from distill_llm.models.cut import Kept, choose, cut_model
from distill_llm.models.cut_sizes import sizes_after
from distill_llm.models.cut_spec import Cut
from distill_llm.models.fresh import auto_class
from distill_llm.models.importance import Importance, measure
from distill_llm.models.load import check_student, load_model
from distill_llm.models.spec import StudentSpec

if TYPE_CHECKING:
    from pathlib import Path

    from distill_llm.core.signals import Batch

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 40}
_LLAMA = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_T5 = {"d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0}
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama-tied": {"model_type": "llama", **_LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **_LLAMA, "head_dim": 8},
    "qwen2": {"model_type": "qwen2", **_LLAMA},
    "qwen3": {"model_type": "qwen3", **_LLAMA, "head_dim": 8},
    "gemma": {"model_type": "gemma", **_LLAMA, "head_dim": 8, "num_key_value_heads": 1},
    "gemma2": {"model_type": "gemma2", **_LLAMA, "head_dim": 8, "sliding_window": 16},
    "t5": {"model_type": "t5", **_T5, "feed_forward_proj": "relu"},
    "t5-1.1": {"model_type": "t5", **_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": {"model_type": "mt5", **_T5, "feed_forward_proj": "gated-gelu", "num_decoder_layers": 2},
}
every_family = pytest.mark.parametrize("name", SIZES)
WITH_HIDDEN = [name for name in SIZES if not name.startswith("gemma")]


def _model(name: str, **sizes: Any) -> Any:
    settings = {**_IDS, **SIZES[name], **sizes}
    config = CONFIG_MAPPING[settings.pop("model_type")](**settings)
    torch.manual_seed(3)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float64).eval()
    if name == "t5-1.1":
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))  # as its checkpoints have it
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


def _batch(model: Any, rows: slice = slice(None), padding: int = 0) -> Batch:
    torch.manual_seed(5)
    ids, mask = torch.randint(3, 40, (6, 7)), torch.ones(6, 7, dtype=torch.long)
    mask[1, 5:] = mask[4, 3:] = 0
    labels = torch.randint(3, 40, (6, 4))
    labels[2, 2:] = -100
    if not model.config.is_encoder_decoder:
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :2] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.nn.functional.pad(labels[:, :-1].clamp_min(0), (1, 0))
    fill = {"labels": -100}
    batch = {
        key: torch.nn.functional.pad(one[rows], (0, padding), value=fill.get(key, 0)) for key, one in batch.items()
    }
    return batch | {"targets": torch.zeros(len(batch["labels"]), dtype=torch.long)}


def _logits(model: Any) -> torch.Tensor:
    batch = _batch(model)
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    with torch.no_grad():
        return model(**{key: batch[key] for key in names if key in batch}).logits[batch["labels"] != -100]


def _measured(model: Any, *, by_loss: bool = False) -> Importance:
    return measure(model, [_batch(model)], by_loss=by_loss, where="x")


def _cut(model: Any, **keys: Any) -> Any:
    cut = Cut.model_validate(keys)
    importance = _measured(model, by_loss=cut.layer_importance == "loss") if cut.measures else None
    return cut_model(model, choose(model, cut, importance, where="x"), where="x")


def _numbers(model: Any) -> int:
    return sum(weight.numel() for weight in model.parameters())


@every_family
def test_cutting_nothing_gives_the_model_to_the_bit(name: str) -> None:
    model = _model(name)
    sizes = family_of(model.config, "x").sizes_of(model.config)
    same = cut_model(model, Kept({stack: range(n) for stack, n in sizes.layers.items()}, {}), where="x")
    assert same is not model
    assert torch.equal(_logits(same), _logits(model))


def _axes(model: Any) -> Any:
    """Each weight with its axes."""
    tensors = dict(model.named_parameters())
    return [(tensors[weight.name], weight.axes) for weight in weights_in(model, "x")]


def _kill(model: Any, unit: str, dead: tuple[int, ...]) -> None:
    """Makes units say nothing: of hidden states nothing is written to them, of others nothing is read."""
    with torch.no_grad():
        for tensor, axes in _axes(model):
            for number, axis in enumerate(axes):
                is_read = number == 1 and axes[0] is not None and axes[0].unit == "hidden"
                if axis is None or axis.unit != unit or not (is_read or unit == "hidden"):
                    continue
                if unit == "hidden" and (len(axes) == 1 and tensor.shape[0] == 24 and not _is_bias(model, tensor)):
                    continue  # a norm's own weight may be anything
                for place in dead:
                    span = torch.arange(place * axis.width, (place + 1) * axis.width)
                    tensor.index_fill_(number, span, 0.0)


def _is_bias(model: Any, tensor: torch.Tensor) -> bool:
    return any(name.endswith("bias") for name, one in model.named_parameters() if one is tensor)


@every_family
@pytest.mark.parametrize("unit", ["heads", "neurons", "hidden"])
def test_units_that_say_nothing_are_the_ones_that_go_and_leave_the_logits_as_they_were(name: str, unit: str) -> None:
    if unit == "hidden" and name not in WITH_HIDDEN:
        return
    model = _model(name)
    sizes = family_of(model.config, "x").sizes_of(model.config)
    # Whole groups of query heads, where heads share a key-value head; 20 is a multiple of the heads, as Llama wants it.
    dead = {
        "heads": (2, 3) if sizes.groups == 2 else (1,),
        "neurons": (0, 7, 30, 31),
        "hidden": tuple(range(3, 24, 6)),
    }[unit]
    _kill(model, unit, dead)
    small = _cut(model, **{unit: sizes.of(unit) - len(dead)})
    assert family_of(small.config, "x").sizes_of(small.config).of(unit) == sizes.of(unit) - len(dead)
    # Hidden states: the constant that keeps a norm from dividing by zero counts a little more among fewer of them.
    torch.testing.assert_close(_logits(small), _logits(model), atol=1e-5 if unit == "hidden" else 1e-10, rtol=1e-5)
    wrong = _cut(model, **{unit: sizes.of(unit) - len(dead)}, by="last" if unit == "heads" else "first")
    assert (_logits(wrong) - _logits(model)).abs().max() > 1e-2, "others matter"


@every_family
@pytest.mark.parametrize(("importance", "layer"), [("block_influence", 0), ("loss", 1)])
def test_a_layer_that_does_nothing_goes_first_and_is_not_missed(name: str, importance: str, layer: int) -> None:
    """The first one too, which in a T5 makes the relative positions of all layers behind it."""
    model = _model(name)
    with torch.no_grad():
        for weight in weights_in(model, "x"):
            is_output = weight.writes or weight.name.endswith(("o_proj.bias", "down_proj.bias"))
            if weight.layer == layer and is_output:
                model.get_parameter(weight.name).zero_()
    fewer = {stack: n - 1 for stack, n in family_of(model.config, "x").sizes_of(model.config).layers.items()}
    layers = fewer if len(fewer) > 1 else fewer["decoder"]
    measured = _measured(model, by_loss=importance == "loss")
    for scores in measured.layers.values():
        assert scores[layer] == pytest.approx(0, abs=1e-9)
    if importance == "block_influence":
        small = _cut(model, layers=layers)
    else:  # a random model may lose by another layer: the dead one is the least that matters, in absolute terms
        kept = {stack: [one for one in range(n + 1) if one != layer] for stack, n in fewer.items()}
        small = _cut(model, layers=kept if len(kept) > 1 else kept["decoder"], layer_importance="loss")
    assert len(list(small.parameters())) < len(list(model.parameters()))
    torch.testing.assert_close(_logits(small), _logits(model), atol=1e-10, rtol=1e-10)


@every_family
def test_a_cut_model_is_an_ordinary_one_when_it_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = _model(name)
    along = ["layers", "heads", "neurons"] + (["hidden"] if name in WITH_HIDDEN else [])
    small = _cut(model, ratio=0.5, along=along).float()
    small.save_pretrained(tmp_path)
    loaded, said = auto_class(small.config).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(_logits(loaded.eval()), _logits(small))
    assert _numbers(loaded) == _numbers(small) < 0.5 * _numbers(model)
    head = family_of(model.config, "x").head_numbers(model.config)
    assert family_of(loaded.config, "x").head_numbers(loaded.config) == head, "heads keep their own width"
    batch = _batch(model)
    written = loaded.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=4)
    assert len(written) == 6


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma", "t5-1.1"])
@pytest.mark.parametrize(
    ("along", "ratio"),
    [(("heads", "neurons"), 0.7), (("layers",), 0.75), (("layers", "heads", "neurons"), 0.6), (("neurons",), 0.85)],
)
def test_a_target_is_met_from_below_by_what_config_and_weights_agree_in(
    name: str, along: tuple[str, ...], ratio: float
) -> None:
    model = _model(name)
    cut = Cut.model_validate({"ratio": ratio, "along": along, "by": "spread"})
    sizes = sizes_after(model.config, cut, "x")
    small = _cut(model, ratio=ratio, along=along, by="spread")
    untied = model.config.is_encoder_decoder and name == "t5-1.1"
    head = 40 * 24 if untied else 0  # a config does not say that this checkpoint has a head of its own
    assert 0.7 * ratio < (_numbers(small) - head) / (_numbers(model) - head) <= ratio
    whole = family_of(model.config, "x").sizes_of(model.config)
    for unit in ("heads", "neurons", "hidden"):
        assert sizes.of(unit) == whole.of(unit) or unit in along


@pytest.mark.parametrize("ratio", [0.8, 0.5, 0.3])
def test_a_target_is_come_near_to_with_every_width_in_about_the_same_ratio(ratio: float) -> None:
    model = _model("t5", d_model=256, d_ff=512, num_heads=8, d_kv=32)
    small = _cut(model, ratio=ratio, by="first")
    assert 0.93 * ratio < _numbers(small) / _numbers(model) <= ratio
    sizes = family_of(small.config, "x").sizes_of(small.config)
    shares = [sizes.heads / 8, sizes.neurons / 512, sizes.hidden / 256]
    assert max(shares) - min(shares) < 0.26, "heads come in eighths"
    number = _cut(model, parameters=round(ratio * _numbers(model)), by="first")
    assert number.config.to_dict() == small.config.to_dict(), "the same target in numbers"


def test_a_size_that_is_given_stays_and_the_others_reach_the_target() -> None:
    model = _model("t5")
    small = _cut(model, ratio=0.6, heads=4, layers={"encoder": 3, "decoder": 1}, by="first")
    sizes = family_of(small.config, "x").sizes_of(small.config)
    assert (sizes.heads, dict(sizes.layers)) == (4, {"encoder": 3, "decoder": 1})
    assert _numbers(small) <= 0.6 * _numbers(model)


@pytest.mark.parametrize(
    ("heads", "groups", "kept"),
    [(4, [0, 1], [0, 2, 3, 4]), (2, [0, 1], [2, 3]), (3, [1], [3, 4, 5])],
    ids=["some of each group", "one of each group", "a whole group"],
)
def test_heads_that_share_a_key_go_together_or_as_many_out_of_each_group(
    heads: int, groups: list[int], kept: list[int]
) -> None:
    model = _model("llama", num_attention_heads=6, head_dim=4)
    found = _measured(model)
    found.units["decoder.1.heads"][:] = [2, 1, 3, 9, 1, 0]  # type: ignore[index]
    chosen = choose(model, Cut(heads=heads), found, where="x")
    assert (chosen.units["decoder.1.groups"], chosen.units["decoder.1.heads"]) == (groups, kept)
    small = cut_model(model, chosen, where="x")
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (heads, len(groups))
    rows = [4 * head + number for head in kept for number in range(4)]
    own, theirs = small.model.layers[1].self_attn, model.model.layers[1].self_attn
    assert torch.equal(own.q_proj.weight, theirs.q_proj.weight[rows])
    assert torch.equal(own.o_proj.weight, theirs.o_proj.weight[:, rows])
    assert torch.equal(own.v_proj.bias, theirs.v_proj.bias.unflatten(0, (2, 4))[groups].flatten())


def test_spread_first_and_last_take_the_places_that_they_name() -> None:
    model = _model("mt5", num_layers=6, num_decoder_layers=4)
    found = {}
    for by in ("spread", "first", "last"):
        cut = Cut.model_validate({"layers": 3, "neurons": 3, "by": by})
        found[by] = choose(model, cut, None, where="x")
    assert found["spread"].layers == {"encoder": [0, 2, 5], "decoder": [0, 2, 3]}
    assert found["first"].layers == {"encoder": [0, 1, 2], "decoder": [0, 1, 2]}
    assert found["last"].layers == {"encoder": [3, 4, 5], "decoder": [1, 2, 3]}
    assert found["last"].units["decoder.1.neurons"] == [29, 30, 31]
    assert found["spread"].units["encoder.5.neurons"] == [0, 16, 31]
    small = cut_model(model, found["last"], where="x")
    assert torch.equal(
        small.encoder.block[1].layer[1].DenseReluDense.wo.weight,
        model.encoder.block[4].layer[1].DenseReluDense.wo.weight[:, 29:],
    )
    positions = "layer.0.SelfAttention.relative_attention_bias.weight"
    assert torch.equal(small.encoder.block[0].get_parameter(positions), model.encoder.block[0].get_parameter(positions))


def test_layers_that_are_named_are_the_ones_that_stay() -> None:
    small = _cut(model := _model("t5"), layers={"encoder": [0, 2], "decoder": [1]})
    assert torch.equal(
        small.decoder.block[0].layer[2].DenseReluDense.wi.weight,
        model.decoder.block[1].layer[2].DenseReluDense.wi.weight,
    )
    assert (small.config.num_layers, small.config.num_decoder_layers) == (2, 1)


def test_a_layer_keeps_the_kind_of_attention_that_it_had() -> None:
    small = _cut(_model("gemma2"), layers=[1, 2])
    assert small.config.layer_types == ["full_attention", "sliding_attention"]
    assert small.model.layers[0].self_attn.sliding_window is None


def test_cutting_draws_no_random_numbers() -> None:
    model = _model("t5")
    torch.manual_seed(1)
    _cut(model, ratio=0.5, by="first")
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_importance_is_what_a_slow_count_gives(name: str) -> None:
    """Token by token and unit by unit, from the model's own tensors; layers from transformers' hidden states."""
    model = _model(name)
    batch, found = _batch(model), _measured(model)
    pair = model.config.is_encoder_decoder
    matrix = "decoder.block.1.layer.1.EncDecAttention.o" if pair else "model.layers.1.self_attn.o_proj"
    wide = "decoder.block.1.layer.2.DenseReluDense.wo" if pair else "model.layers.1.mlp.down_proj"
    norm = "decoder.block.1.layer.0.layer_norm" if pair else "model.layers.1.input_layernorm"
    seen: dict[str, torch.Tensor] = {}
    for module in (matrix, wide, norm):
        model.get_submodule(module).register_forward_hook(lambda _, ins, __, key=module: seen.update({key: ins[0]}))
    inputs = {key: one for key, one in batch.items() if key not in ("labels", "targets")}
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
    labels = batch["labels"]
    tokens = [
        (row, place)
        for row in range(6)
        for place in range(labels.shape[1])
        if (bool((labels[row, place:] != -100).any()) if pair else bool(batch["attention_mask"][row, place]))
    ]
    heads, neurons = torch.zeros(4), torch.zeros(32)
    outward, down = model.get_submodule(matrix).weight, model.get_submodule(wide).weight
    with torch.no_grad():
        for row, place in tokens:
            for head in range(4):
                span = slice(head * 6, head * 6 + 6)
                heads[head] += (outward[:, span] @ seen[matrix][row, place, span]).square().sum()
            for neuron in range(32):
                neurons[neuron] += (down[:, neuron] * seen[wide][row, place, neuron]).square().sum()
    space = "decoder.1.cross" if pair else "decoder.1.heads"
    shares = torch.tensor(found.units[space])
    torch.testing.assert_close(shares, heads / heads.sum(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.tensor(found.units["decoder.1.neurons"]), neurons / neurons.sum(), atol=1e-5, rtol=1e-5
    )
    states = outputs.decoder_hidden_states if pair else outputs.hidden_states
    squares = sum(states[1][row, place].square() for row, place in tokens) / len(tokens)
    torch.testing.assert_close(torch.tensor(found.squares[f"{norm}.weight"]), squares.float(), atol=1e-5, rtol=1e-5)
    for layer in (0, 1):
        cosines = [torch.dot(a, b) / (a.norm() * b.norm()) for a, b in _pairs(states, layer, tokens)]
        assert found.layers["decoder"][layer] == pytest.approx(1 - float(sum(cosines)) / len(cosines), abs=1e-9)


def _pairs(states: Any, layer: int, tokens: Any) -> Any:
    return [(states[layer][row, place], states[layer + 1][row, place]) for row, place in tokens]


@every_family
def test_importance_does_not_depend_on_batches_or_padding(name: str) -> None:
    model = _model(name)
    parts = [_batch(model, slice(0, 2)), _batch(model, slice(2, 6), padding=3)]
    one, several = _measured(model, by_loss=True), measure(model, parts, by_loss=True, where="x")
    for part in ("layers", "units", "squares"):
        mine, theirs = getattr(one, part), getattr(several, part)
        assert list(mine) == list(theirs)
        for key in mine:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-6, abs=1e-5 if part == "layers" else 1e-9), key


def test_the_loss_without_a_layer_is_what_transformers_gives_for_the_rest() -> None:
    model = _model("llama")
    found = _measured(model, by_loss=True).layers["decoder"]
    batch = _batch(model)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    for layer in range(3):
        less = _cut(model, layers=[one for one in range(3) if one != layer])
        with torch.no_grad():
            grown = float(less(**inputs).loss - model(**inputs).loss)
        assert found[layer] == pytest.approx(grown, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("t5", {"heads": 5}, "heads: 5 are more than the 4"),
        ("t5", {"layers": 4}, "encoder that has 3 layers"),
        ("t5", {"layers": [1, 3]}, "layers from 0 to 2"),
        ("t5", {"layers": {"encoder": 1, "decoder": 2}}, "decoder is the deeper one"),
        ("llama", {"layers": {"encoder": 1}}, "has one stack"),
        ("llama", {"heads": 3}, "neither whole groups"),
        ("llama", {"hidden": 23}, "refuses"),
        ("gemma", {"hidden": 16}, "multiplies its embeddings"),
        ("t5", {"ratio": 0.01, "along": ["heads"]}, "is not reached"),
    ],
)
def test_sizes_that_cannot_be_are_refused(name: str, keys: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sizes_after(_model(name).config, Cut.model_validate(keys), "student.cut")


def test_a_cut_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    _model("t5").config.save_pretrained(tmp_path)
    spec = {"model": str(tmp_path), "tokenizer": {"kind": "words"}, "cut": {"heads": 5}}
    with pytest.raises(ConfigError, match=r"student\.cut\.heads: 5 are more than the 4"):
        check_student(StudentSpec.model_validate(spec))


def test_models_and_weights_that_are_not_known_are_refused() -> None:
    config = CONFIG_MAPPING["gpt2"](n_embd=16, n_layer=2, n_head=2, vocab_size=40)
    with pytest.raises(ConfigError, match=r"'gpt2'.*Expected one of t5, mt5, llama"):
        sizes_after(config, Cut(neurons=8), "student.cut")
    model = _model("llama")
    model.model.layers[1].extra = torch.nn.Linear(3, 3)
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.extra\.weight"):
        weights_in(model, "student.cut")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "nothing is cut"),
        ({"ratio": 0.5, "parameters": 10}, "not both"),
        ({"ratio": 0.5, "along": ["heads"], "heads": 2}, "nothing is left"),
        ({"layers": [2, 1]}, "in order"),
    ],
)
def test_a_cut_that_says_nothing_or_too_much_is_refused(keys: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Cut.model_validate(keys)


def test_a_folder_of_a_cut_model_is_a_teacher_like_any_other(tmp_path: Path) -> None:
    _cut(_model("t5"), ratio=0.5).float().save_pretrained(tmp_path)
    assert load_model(str(tmp_path), where="x").config.num_heads < 4
