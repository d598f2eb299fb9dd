"""What a training computes in: chosen by recipe, machine and size alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distill_llm.training.precision import MIN_PARAMETERS, choose_precision

SMALL, LARGE = nn.Linear(2, 2), nn.Linear(1, MIN_PARAMETERS, bias=False)


def _cpu(monkeypatch: pytest.MonkeyPatch, **has: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: has.get(name, False))


@pytest.mark.parametrize("instructions", ["_is_amx_tile_supported", "_is_avx512_bf16_supported"])
def test_a_cpu_that_has_it_computes_in_bfloat16_where_the_student_is_large(
    instructions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _cpu(monkeypatch, **{instructions: True})
    assert choose_precision("auto", LARGE).name == "bfloat16"
    small = choose_precision("auto", SMALL)
    assert small.name == "float32"
    assert "6 parameters are too few" in small.why


def test_elsewhere_it_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    _cpu(monkeypatch)
    chosen = choose_precision("auto", LARGE)
    assert (chosen.bfloat16, chosen.why) == (False, "this CPU has no instructions for bfloat16")
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name)
    assert not choose_precision("auto", LARGE).bfloat16, "a torch that does not say"


@pytest.mark.parametrize("supported", [True, False])
def test_a_gpu_decides_by_itself(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    assert choose_precision("auto", SMALL).bfloat16 == supported


@pytest.mark.parametrize(("asked", "expected"), [("float32", False), ("bfloat16", True)])
def test_the_recipe_has_the_last_word(asked: Any, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _cpu(monkeypatch, _is_avx512_bf16_supported=True)
    for model in (SMALL, LARGE):
        assert choose_precision(asked, model).bfloat16 == expected
