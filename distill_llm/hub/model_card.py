"""The README of a distilled model on the Hub: what it is, how good against honest controls, how it was made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distill_llm.hub.licences import data_restriction, hub_licence, teacher_restriction
from distill_llm.hub.markdown import CITATION, HOME, code, table

_TAGS = ("distillation", "distilling-step-by-step", "rationales", "distill-llm")


@dataclass(frozen=True)
class TeacherFacts:
    """A model that taught, by text or by its signals. ``licence``: of what it writes; "" where nobody knows."""

    name: str
    revision: str
    licence: str
    taught: str


@dataclass(frozen=True)
class TermFacts:
    """One term of the objective; ``weight`` and ``until`` as the recipe has them."""

    name: str
    weight: str
    loss: str
    targets: Sequence[str]
    teacher: str = ""


@dataclass(frozen=True)
class ScoreFacts:
    """The scorecard's say on the model, with its tables as Markdown. ``accuracy`` is a share of 1."""

    metric: str
    split: str
    accuracy: float
    num_examples: int
    verdict: str
    models: str
    comparisons: str
    notes: Sequence[str]


@dataclass(frozen=True)
class ModelCardFacts:
    """All that the card says. A text is empty, a number None, where nobody knows.

    ``base_model`` is on the Hub; "" for a fresh model. ``adapter``: what is sent needs that base. ``example`` is a
    prompt as the model was trained on it, ``answer`` what it writes for it; ``decoder_start``: ids that its decoder
    reads before it writes, where that is more than a start token. ``exports``: the table of other formats, where they
    are sent along.
    """

    repo_id: str
    task: str
    task_data: str
    task_licence: str
    licence: str
    base_model: str
    adapter: bool
    is_encoder_decoder: bool
    parameters: int
    teachers: Sequence[TeacherFacts]
    funnel: str
    terms: Sequence[TermFacts]
    training: Sequence[str]
    score: ScoreFacts | None
    speed: str
    example: str
    answer: str
    decoder_start: Sequence[int]
    chat: bool
    max_new_tokens: int
    files: Sequence[str]
    version: str
    exports: str = ""


def model_card(facts: ModelCardFacts) -> str:
    """The text of README.md, with the head that the Hub reads (``model-index`` among it)."""
    sections = (
        f"---\n{_head(facts)}\n---",
        f"# {facts.repo_id.split('/')[-1]}",
        _introduction(facts),
        _warnings(facts),
        _use(facts),
        _score(facts),
        _exports(facts),
        f"## How it was made\n\n{_teachers(facts)}",
        f"### Rationales\n\n{facts.funnel}" if facts.funnel else "",
        f"### Objective\n\n{_objective(facts.terms)}",
        "### Training\n\n" + "\n".join(f"- {line}" for line in facts.training),
        f"## Intended use and limits\n\n{_limits(facts)}",
        CITATION,
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def _use(facts: ModelCardFacts) -> str:
    if not facts.example:
        return ""
    writes = f"\n\nIt writes {code(facts.answer)}." if facts.answer else ""
    return f"## Use\n\n```python\n{snippet(facts)}\n```{writes}"


def snippet(facts: ModelCardFacts) -> str:
    """A few lines that load the model by its name and answer the example as the scorecard's answers were made."""
    kind = "AutoModelForSeq2SeqLM" if facts.is_encoder_decoder else "AutoModelForCausalLM"
    name, text = json.dumps(facts.repo_id), json.dumps(facts.example, ensure_ascii=False)
    reads = f'tokenizer({text}, return_tensors="pt")'
    if facts.chat:
        chat = f'[{{"role": "user", "content": {text}}}]'
        reads = (
            f'tokenizer.apply_chat_template({chat}, add_generation_prompt=True, return_tensors="pt", return_dict=True)'
        )
    begun, new = "", "" if facts.is_encoder_decoder else "[:, inputs['input_ids'].shape[1]:]"
    if facts.decoder_start:
        begun = f", decoder_input_ids=torch.tensor([{list(facts.decoder_start)}])"
        new = f"[:, {len(facts.decoder_start)}:]"
    return (
        ("import torch\n" if begun else "") + f"from transformers import {kind}, AutoTokenizer\n"
        f"model, tokenizer = {kind}.from_pretrained({name}), AutoTokenizer.from_pretrained({name})\n"
        f"inputs = {reads}\n"
        f"written = model.generate(**inputs{begun}, max_new_tokens={facts.max_new_tokens}, do_sample=False){new}\n"
        "print(tokenizer.decode(written[0], skip_special_tokens=True))"
    )


def _head(facts: ModelCardFacts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results: list[EvalResult] = []
    if facts.score is not None:
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=facts.task_data or facts.task,
                dataset_name=facts.task,
                dataset_split=facts.score.split,
                metric_type="accuracy",
                metric_name=facts.score.metric,
                metric_value=round(facts.score.accuracy, 6),
            )
        )
    options: dict[str, Any] = hub_licence(facts.licence)
    data = ModelCardData(
        library_name="peft" if facts.adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[*_TAGS, facts.task],
        base_model=facts.base_model or None,
        datasets=[facts.task_data] if facts.task_data else None,
        model_name=facts.repo_id.split("/")[-1],
        eval_results=results or None,
        **options,
    )
    return data.to_yaml(line_break="\n")


def _introduction(facts: ModelCardFacts) -> str:
    what = f"{_parameters(facts.parameters)} parameters"
    base = f", from {code(facts.base_model)}" if facts.base_model else ", trained from random weights"
    by = " and ".join(dict.fromkeys(code(teacher.name) for teacher in facts.teachers)) or "the data's own rationales"
    data = f" (data: {code(facts.task_data)})" if facts.task_data else ""
    return (
        f"A model of {what}{base}, for one task: **{facts.task}**{data}. It was "
        f"[distilled step by step](https://arxiv.org/abs/2305.02301) from {by}, with [distill-llm]({HOME}) "
        f"{facts.version}."
    )


def _parameters(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def licence_warnings(facts: ModelCardFacts) -> list[str]:
    """What the licences of teachers and data forbid or leave open, a sentence each."""
    found = [(one.name, teacher_restriction(one.name, one.licence)) for one in facts.teachers]
    said = [f"{name}: {warning}" for name, warning in dict.fromkeys(found) if warning]
    data = data_restriction(facts.task_licence)
    return [*said, *([data] if data else [])]


def _warnings(facts: ModelCardFacts) -> str:
    found = licence_warnings(facts)
    if not found:
        return ""
    lines = [*found, "Read the terms before you use or publish this model."]
    return "> [!WARNING]\n" + "\n>\n".join(f"> {line}" for line in lines)


def _score(facts: ModelCardFacts) -> str:
    score = facts.score
    if score is None:
        return "## How good it is\n\nIt was not scored. `distill-llm evaluate` does."
    parts = [
        f"## How good it is\n\n**{score.verdict}**",
        f"{score.metric} on {score.num_examples:,} {score.split} examples. A control is the same model trained on "
        "labels alone: it says what distilling added.",
        score.models,
        score.comparisons,
        facts.speed,
        "\n".join(f"- {note}" for note in score.notes),
    ]
    return "\n\n".join(part for part in parts if part)


def _exports(facts: ModelCardFacts) -> str:
    if not facts.exports:
        return ""
    return (
        "## Other formats\n\nEach lies in a folder `exports/<format>` of this repository, with its tokenizer. It was "
        f"opened in its own runtime and held against the student:\n\n{facts.exports}"
    )


def _teachers(facts: ModelCardFacts) -> str:
    rows = [
        (code(one.name), code(one.revision) if one.revision else "", one.licence or "unknown", one.taught)
        for one in facts.teachers
    ]
    lines = [table(("teacher", "revision", "licence of what it writes", "taught"), rows)] if rows else []
    lines.append(f"Task: {facts.task}; licence of its data: {facts.task_licence or 'unknown'}.")
    kept = ", ".join(code(name) for name in facts.files)
    lines.append(f"In this repository: {kept}. `distill-llm run distill/recipe.yaml` makes the model again.")
    return "\n\n".join(lines)


def _objective(terms: Sequence[TermFacts]) -> str:
    """A weighted sum of means, each over the tokens of its own targets."""
    parts = [f"{term.weight} \\cdot \\overline{{\\ell_{{\\text{{{term.name.replace('_', ' ')}}}}}}}" for term in terms]
    rows = [(term.name, term.weight, term.loss, ", ".join(term.targets), term.teacher or "-") for term in terms]
    return (
        f"$$\\mathcal{{L}} = {' + '.join(parts)}$$\n\nEach bar is a mean over the tokens of the term's own targets.\n\n"
        + table(("term", "weight", "loss", "targets", "teacher"), rows)
    )


def _limits(facts: ModelCardFacts) -> str:
    lines = [
        f"It does one task, {facts.task}, with prompts in the form of the example above. Of anything else nothing is "
        "known.",
        "It learned from what teachers wrote: their errors and biases are in it, and nothing was filtered for harmful "
        "or personal content.",
        "A rationale that it writes is not an account of how it came to its label.",
        "The score is of one training run on one test set; its interval does not cover the spread between seeds.",
    ]
    return "\n".join(f"- {line}" for line in lines)
