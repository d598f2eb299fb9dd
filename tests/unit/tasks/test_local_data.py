"""The real data sets, where they lie beside the checkout: sizes, labels, overlaps, and the teacher's numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from distill_llm.tasks.cqa import Cqa
from distill_llm.tasks.gsm8k import Gsm8k
from distill_llm.tasks.strategyqa import StrategyQa
from distill_llm.tasks.svamp import Svamp

if TYPE_CHECKING:
    from distill_llm.tasks.base import SplitName, Task

SHARED = Path(__file__).parents[3].parent / "shared"
FOLDERS = {"cqa": "dss/cqa", "svamp": "dss/svamp", "gsm8k": "gsm8k", "strategyqa": "strategyqa"}
TASKS: dict[str, type[Task]] = {"cqa": Cqa, "svamp": Svamp, "gsm8k": Gsm8k, "strategyqa": StrategyQa}
SIZES = {"cqa": (9741, 1221), "svamp": (800, 200), "gsm8k": (7473, 1319), "strategyqa": (2061, 229)}

# Right answers of PaLM 540B, from its published completions; "published" is how the code of Hsieh et al. 2023 (arXiv:
# 2305.02301) reads them: 74.26%, 77.23%, 73.25%, 74.00%. Then those without an answer sentence that can be read.
PALM = {
    ("cqa", "published", "train"): (7234, 3),
    ("cqa", "published", "test"): (943, 0),
    ("cqa", "lenient", "train"): (7334, 3),
    ("cqa", "lenient", "test"): (955, 0),
    ("svamp", "published", "train"): (586, 13),
    ("svamp", "published", "test"): (148, 2),
    ("svamp", "lenient", "train"): (594, 11),
    ("svamp", "lenient", "test"): (155, 2),
}

pytestmark = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason=f"no data sets under {SHARED}/data")


def local(kind: str, **settings: str) -> Task:
    return TASKS[kind].model_validate({"data": str(SHARED / "data" / FOLDERS[kind]), **settings})


def completions(kind: str, split: str) -> list[str]:
    files = (SHARED / "data" / FOLDERS[kind] / "llm").glob(f"{split}_CoT_*.json")
    ordered = sorted(files, key=lambda file: int(file.stem.rpartition("_")[2]))
    return [text for file in ordered for text in json.loads(file.read_text())]


@pytest.mark.parametrize("kind", TASKS)
def test_sizes_labels_and_no_overlap(kind: str) -> None:
    task = local(kind)
    found = task.read()
    assert (len(found["train"]), len(found["test"])) == SIZES[kind]
    splits = local(kind, overlap="refuse" if kind != "strategyqa" else "drop").load(seed=0)
    assert len(splits.test) == SIZES[kind][1]
    for example in (*splits.train, *splits.validation, *splits.test):
        assert example.label is not None
        assert example.prompt.startswith("Q: ")
        assert example.prompt.endswith("\nA:")
        assert (example.rationale is None) == (kind == "svamp")
        sentence = task.answer_sentence(example.label, example)
        stated = re.findall(task.answer_pattern(), f"{example.rationale} {sentence}")[-1]
        assert task.same(task.normalise(stated, example) or "", example.label)


def test_strategyqa_has_one_question_twice_in_train_and_none_in_both() -> None:
    found = local("strategyqa").read()
    train, test = ([example.input for example in found[split]] for split in ("train", "test"))
    assert len(train) - len(set(train)) == 1
    assert not set(train) & set(test)


def test_gsm8k_rationales_have_no_annotations() -> None:
    for examples in local("gsm8k").read().values():
        assert not any(re.search("<<|>>|####", example.rationale or "") for example in examples)


@pytest.mark.parametrize(("kind", "reading", "split"), PALM)
def test_accuracy_of_the_published_teacher(kind: str, reading: str, split: SplitName) -> None:
    task = local(kind, reading=reading)
    examples, texts = task.read()[split], completions(kind, split)
    right = unread = 0
    for example, text in zip(examples, texts, strict=True):
        stated = re.findall(task.answer_pattern(), re.split(r"\n\s*Q:", text)[0])
        unread += not stated
        label = task.normalise(stated[-1], example) if stated else None
        right += label is not None and task.same(label, example.label or "")
    assert (right, unread) == PALM[kind, reading, split]
