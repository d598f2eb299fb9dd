"""The card of a rationale data set: a head that the Hub and `datasets` read, a body that a stranger understands."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill_llm.hub.licences import data_restriction, hub_licence, teacher_restriction
from distill_llm.hub.rationale_card import RationaleCardFacts, SplitFacts, rationale_card

TRAIN = SplitFacts(
    file="train.parquet",
    rows=49_705,
    examples=9_741,
    asked=48_705,
    completed=48_700,
    parsed=47_000,
    agreed=36_012,
    kept=36_001,
    dropped={"no answer found": 1_700, "rule: agrees_with_label": 10_999, "not completed": 5},
    gold_examples=9_741,
    accuracy=0.7612,
)
TEST = SplitFacts("test.parquet", 1_221, 1_221, 1_221, 1_221, 1_200, None, 1_200, {"cut | short": 21})
FACTS = RationaleCardFacts(
    repo_id="ann/cqa-rationales",
    task="cqa",
    task_data="tau/commonsense_qa",
    task_licence="MIT",
    teacher="org/teacher-8b",
    splits={"train": TRAIN, "test": TEST},
    columns={"rationale": "the text before the answer", "outcome": "`kept`, or why not | really"},
    command="distill-llm generate-rationales cqa.yaml",
    version="0.1.0",
    licence="apache-2.0",
    language="en",
    task_categories=("question-answering",),
    teacher_revision="0e9e39f",
    teacher_licence="apache-2.0",
    prompt_style="chat",
    prompt_fingerprint="0123456789abcdef",
    exemplars=7,
    sampling={"temperature": 0.7, "max_new_tokens": 256, "stop": ("\n\n",)},
    samples=5,
    keep_rules=("parsable", "agrees_with_label"),
    hint_samples=1,
    requests=55_321,
    retries=1,
    tokens_in=12_345_678,
    tokens_out=4_567_890,
    cost=1234.5,
    currency="USD",
)
BARE = RationaleCardFacts(
    repo_id="ann/rows",
    task="jsonl",
    task_data="",
    task_licence="",
    teacher="somebody/model",
    splits={"train": replace(TRAIN, agreed=None, gold_examples=0, accuracy=None, rows=999)},
    columns={"rationale": "text"},
    command="distill-llm run a.yaml",
    version="0.1.0",
)


def _head(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def _row(card: str, name: str) -> list[str]:
    """The cells of the table row that starts with ``name``."""
    (line,) = [line for line in card.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[2:-1]]


def test_the_hubs_own_reader_takes_the_head() -> None:
    from huggingface_hub import DatasetCard

    card = DatasetCard(rationale_card(FACTS))
    card.data.to_yaml()
    found = card.data.to_dict()
    assert found["license"] == "apache-2.0"
    assert found["language"] == ["en"]
    assert found["tags"] == ["distillation", "rationales", "chain-of-thought", "distill-llm", "cqa"]
    assert found["size_categories"] == ["10K<n<100K"]
    assert found["task_categories"] == ["question-answering"]
    assert card.text.lstrip().startswith("# Rationales for cqa by org/teacher-8b")


def test_what_nobody_knows_is_left_out_or_said_to_be_unknown() -> None:
    card = rationale_card(BARE)
    head = _head(card)
    assert head["license"] == "unknown"
    assert "language" not in head
    assert "task_categories" not in head
    assert "nobody knows how often the teacher is right" in card
    assert "was not checked against any" in card
    assert "What it took" not in card
    assert "None" not in card
    assert "``" not in card.replace("```", "")
    assert _row(card, "label is the gold one") == ["-"]


def test_a_folder_with_the_card_loads_by_its_configs(tmp_path: Path) -> None:
    import pyarrow as pa
    from datasets import load_dataset
    from pyarrow import parquet

    schema = pa.schema([("outcome", pa.string()), ("hinted", pa.bool_())])
    for name, outcomes in {"train": ["kept", "no answer found"], "test": ["kept"], "journal": ["kept"] * 9}.items():
        rows = [{"outcome": outcome, "hinted": False} for outcome in outcomes]
        parquet.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / f"{name}.parquet")
    (tmp_path / "README.md").write_text(rationale_card(FACTS), encoding="utf-8")

    found = load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert {name: split.num_rows for name, split in found.items()} == {"train": 2, "test": 1}


def test_the_snippet_on_the_card_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, split: str) -> Any:
        asked.append((name, split))
        return datasets.Dataset.from_list([{"outcome": "kept", "a": 1}, {"outcome": "rule: dedupe", "a": 2}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    snippet = rationale_card(FACTS).split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert asked == [("ann/cqa-rationales", "train")]
    assert names["rationales"]["a"] == [1]


@pytest.mark.parametrize(
    ("rows", "size"),
    [
        (0, "n<1K"),
        (999, "n<1K"),
        (1_000, "1K<n<10K"),
        (99_999, "10K<n<100K"),
        (100_000, "100K<n<1M"),
        (5_000_000, "1M<n<10M"),
        (10**11, "100B<n<1T"),
        (10**12, "n>1T"),
    ],
)
def test_the_size_is_the_hubs_name_of_all_rows_together(rows: int, size: str) -> None:
    splits = {"train": replace(TRAIN, rows=rows - rows // 2), "test": replace(TEST, rows=rows // 2)}
    assert _head(rationale_card(replace(FACTS, splits=splits)))["size_categories"] == [size]


def test_the_funnel_has_a_column_for_each_split_and_a_row_for_each_reason() -> None:
    card = rationale_card(FACTS)
    assert _row(card, "completions asked for") == ["48,705", "1,221"]
    assert _row(card, "completed") == ["48,700", "1,221"]
    assert _row(card, "label could be read") == ["47,000", "1,200"]
    assert _row(card, "label is the gold one") == ["36,012", "-"]
    assert _row(card, "**kept**") == ["**36,001** (73.9%)", "**1,200** (98.3%)"]
    assert _row(card, "dropped: no answer found") == ["1,700", "0"]
    assert _row(card, "dropped by `agrees_with_label`") == ["10,999", "0"]
    assert _row(card, r"dropped: cut \| short") == ["0", "21"]
    assert _row(card, "`outcome`") == [r"`kept`, or why not \| really"]


def test_the_teacher_is_scored_only_where_gold_labels_are_known() -> None:
    card = rationale_card(FACTS)
    assert "the gold one for 76.1% of 9,741 train examples.\n" in card
    both = {"train": TRAIN, "test": replace(TEST, gold_examples=1, accuracy=1.0)}
    assert "9,741 train examples and 100.0% of 1 test example." in rationale_card(replace(FACTS, splits=both))


def test_the_making_can_be_read_off() -> None:
    card = rationale_card(FACTS)
    assert "`org/teacher-8b`, revision `0e9e39f`" in card
    assert "a chat with 7 worked examples before the question; its fingerprint is `0123456789abcdef`" in card
    assert '5 completions per example, `temperature: 0.7`, `max_new_tokens: 256`, `stop: ["\\n\\n"]`.' in card
    assert "pass these rules: `parsable`, then `agrees_with_label`." in card
    assert "shown that label and asked again for 1 completion." in card
    assert "55,321 requests, 1 retry among them; 12,345,678 tokens read and 4,567,890 tokens written" in card
    assert "It cost 1,234.50 USD." in card
    assert "```bash\ndistill-llm generate-rationales cqa.yaml\n```" in card
    assert "arXiv:2305.02301" in card


def test_numbers_and_words_agree() -> None:
    one = replace(FACTS, exemplars=1, samples=1, keep_rules=("dedupe",), requests=1, retries=0, cost=0.004, sampling={})
    card = rationale_card(replace(one, tokens_in=1, tokens_out=0, prompt_style="text", hint_samples=0))
    assert "plain text with 1 worked example before" in card
    assert "1 completion per example.\n" in card
    assert "pass this rule: `dedupe`." in card
    assert "1 request; 1 token read and 0 tokens written by the teacher. It cost less than 0.01 USD." in card
    assert "never saw a gold label" in card
    assert "hinted rationale" not in card


def test_rationales_of_people_are_not_said_to_be_a_models() -> None:
    card = rationale_card(replace(FACTS, from_data=True, teacher="gold", teacher_licence="", hint_samples=0))
    assert "# Rationales for cqa\n" in card
    assert "come with the data of the task **cqa**" in card
    assert "machine-generated" not in card
    assert "WARNING" not in card
    assert "eacher's accuracy" not in card
    assert "Sampling" not in card
    assert "The teacher makes mistakes" not in card


def test_a_teacher_and_data_without_restrictions_need_no_warning() -> None:
    assert "WARNING" not in rationale_card(FACTS)


def test_every_restriction_stands_in_one_warning_above_the_snippet() -> None:
    card = rationale_card(replace(FACTS, teacher="gpt-4o", teacher_licence="", task_licence="CC BY-NC 4.0"))
    assert card.count("[!WARNING]") == 1
    warning = card.split("## Use")[0].split("[!WARNING]")[1]
    assert "compete with OpenAI" in warning
    assert "data (CC BY-NC 4.0) allows no commercial use" in warning


@pytest.mark.parametrize(
    ("teacher", "licence", "said"),
    [
        ("gpt-4o-mini", "", "OpenAI"),
        ("o3", "unknown", "OpenAI"),
        ("any", "OpenAI terms of use", "OpenAI"),
        ("claude-sonnet", "", "Anthropic"),
        ("models/gemini-2.5-pro", "", "Gemini API"),
        ("meta-llama/Llama-2-7b-hf", "", "other than Llama"),
        ("any", "llama3", "other than Llama"),
        ("any", "Meta Llama 3 Community License", "other than Llama"),
        ("meta-llama/Llama-3.3-70B-Instruct", "", "Built with Llama"),
        ("any", "llama3.1", "Built with Llama"),
        ("any", "llama4", "Built with Llama"),
        ("google/gemma-2-9b", "gemma", "derivative of Gemma"),
        ("any", "cc-by-nc-4.0", "no commercial use"),
        ("any", "CC BY-NC-SA 4.0", "no commercial use"),
        ("any", "qwen-research", "no commercial use"),
        ("any", "tongyi-qianwen", "Qwen"),
        ("any/model", "", "Nobody has said"),
        ("openai/gpt-oss-20b", "", "Nobody has said"),
        ("Qwen/Qwen2.5-7B", "", "Nobody has said"),
        ("TinyLlama/TinyLlama-1.1B", "", "Nobody has said"),
    ],
)
def test_a_teacher_that_restricts_its_output_is_known(teacher: str, licence: str, said: str) -> None:
    assert said in (teacher_restriction(teacher, licence) or "")


@pytest.mark.parametrize("licence", ["apache-2.0", "MIT", "BSD-3-Clause", "CC BY-SA 4.0", "bigscience-bloom-rail-1.0"])
def test_a_free_licence_is_believed_whatever_the_teacher_is_called(licence: str) -> None:
    assert teacher_restriction("openai/gpt-4-like-llama-3-gemma", licence) is None
    assert data_restriction(licence) is None


def test_unknown_data_is_said_to_be_unknown() -> None:
    assert data_restriction("") == data_restriction("unknown") == "The licence of the task's data is not known."


@pytest.mark.parametrize(
    ("licence", "found"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("CC BY-NC 4.0", {"license": "cc-by-nc-4.0"}),
        ("llama3.1", {"license": "llama3.1"}),
        ("", {"license": "unknown"}),
        ("My own terms", {"license": "other", "license_name": "my-own-terms"}),
        ("mit-like", {"license": "other", "license_name": "mit-like"}),
    ],
)
def test_a_licence_gets_the_hubs_name_or_its_own(licence: str, found: dict[str, str]) -> None:
    assert hub_licence(licence) == found
