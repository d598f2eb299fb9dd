"""The README of a rationale data set on the Hub: what it is, how it was made, what it is worth, what restricts it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import yaml

from distill_llm.hub.licences import data_restriction, hub_licence, teacher_restriction

_HOME = "https://github.com/distill-llm/distill-llm"
_TAGS = ("distillation", "rationales", "chain-of-thought", "distill-llm")
_CITATION = """\
@inproceedings{hsieh2023distilling,
  title     = {Distilling Step-by-Step! Outperforming Larger Language Models with Less Training Data and Smaller Model Sizes},
  author    = {Hsieh, Cheng-Yu and Li, Chun-Liang and Yeh, Chih-Kuan and Nakhost, Hootan and Fujii, Yasuhisa and
               Ratner, Alexander and Krishna, Ranjay and Lee, Chen-Yu and Pfister, Tomas},
  booktitle = {Findings of the Association for Computational Linguistics: ACL 2023},
  year      = {2023},
  eprint    = {2305.02301},
  archivePrefix = {arXiv}
}"""  # noqa: E501


@dataclass(frozen=True)
class SplitFacts:
    """One split's file and funnel, counted in completions unless it says examples.

    ``agreed`` reached the gold label; None where no example has one. ``dropped``: reason to count. ``accuracy`` is the
    share of ``gold_examples`` for which the teacher's label, without hints, is the gold one; None where unknown.
    """

    file: str
    rows: int
    examples: int
    asked: int
    completed: int
    parsed: int
    agreed: int | None
    kept: int
    dropped: Mapping[str, int]
    gold_examples: int = 0
    accuracy: float | None = None


@dataclass(frozen=True)
class MemberFacts:
    """One of several teachers; counts are of all splits. ``right``: share of ``known`` completions; ``say``: in votes.

    ``dropped`` says why it was asked no more, if it was not.
    """

    name: str
    model: str
    revision: str
    licence: str
    samples: int
    prompt: str
    asked: int
    completed: int
    kept: int
    known: int
    right: int
    say: float
    dropped: str = ""
    cost: float | None = None


@dataclass(frozen=True)
class RationaleCardFacts:
    """All that the card says. A text is empty, a count or cost None, where nobody knows.

    ``licence`` is that of this data set, ``teacher_licence`` that of what the teacher writes. ``from_data``: the
    rationales are those of the data itself, no model wrote them. ``members``: the teachers, where there are several.
    ``splits`` and ``columns`` are shown in their order, ``keep_rules`` as they were applied. ``task_categories`` are
    those of the Hub, such as question-answering.
    """

    repo_id: str
    task: str
    task_data: str
    task_licence: str
    teacher: str
    splits: Mapping[str, SplitFacts]
    columns: Mapping[str, str]
    command: str
    version: str
    licence: str = ""
    language: str = ""
    task_categories: Sequence[str] = ()
    teacher_revision: str = ""
    teacher_licence: str = ""
    from_data: bool = False
    prompt_style: str = ""
    prompt_fingerprint: str = ""
    exemplars: int = 0
    sampling: Mapping[str, str | int | float | Sequence[str]] = field(default_factory=dict)
    samples: int = 1
    keep_rules: Sequence[str] = ()
    hint_samples: int = 0
    requests: int | None = None
    retries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None
    currency: str = ""
    members: Sequence[MemberFacts] = ()


def rationale_card(facts: RationaleCardFacts) -> str:
    """The text of README.md, with the head that the Hub and ``load_dataset`` read."""
    sections = (
        f"---\n{_head(facts)}---",
        f"# {_title(facts)}",
        _introduction(facts),
        _warnings(facts),
        _use(facts),
        f"## Columns\n\n{_columns(facts)}",
        f"## How it was made\n\n{_making(facts)}\n\n```bash\n{facts.command}\n```",
        f"## What came of it\n\n{_funnel(facts.splits)}",
        "" if facts.from_data else _accuracy(facts.splits),
        _members(facts),
        _ledger(facts),
        f"## Limits\n\n{_limits(facts)}",
        f"## Citation\n\nThe method is that of Hsieh et al. (2023), [arXiv:2305.02301](https://arxiv.org/abs/2305.02301):"
        f"\n\n```bibtex\n{_CITATION}\n```",
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def _title(facts: RationaleCardFacts) -> str:
    return f"Rationales for {facts.task}" + ("" if facts.from_data else f" by {facts.teacher}")


def _head(facts: RationaleCardFacts) -> str:
    files = [{"split": name, "path": split.file} for name, split in facts.splits.items()]
    wanted = {
        **hub_licence(facts.licence),
        "language": [facts.language] if facts.language else None,
        "pretty_name": _title(facts),
        "annotations_creators": None if facts.from_data else ["machine-generated"],
        "task_categories": list(facts.task_categories),
        "tags": [*_TAGS, facts.task],
        "size_categories": [_size(sum(split.rows for split in facts.splits.values()))],
        "configs": [{"config_name": "default", "data_files": files}],
    }
    return yaml.safe_dump({key: value for key, value in wanted.items() if value}, sort_keys=False, allow_unicode=True)


def _size(rows: int) -> str:
    """The Hub's name of a size: ``1K<n<10K``."""
    bounds = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    below = next((index for index in range(len(bounds)) if rows < 10 ** (index + 3)), None)
    if below is None:
        return "n>1T"
    return f"{bounds[below - 1]}<n<{bounds[below]}" if below else "n<1K"


def _introduction(facts: RationaleCardFacts) -> str:
    source = f" (data: {_code(facts.task_data)})" if facts.task_data else ""
    if facts.from_data:
        what = f"The rationales that come with the data of the task **{facts.task}**{source}, beside the labels."
    else:
        what = (
            f"Step-by-step rationales that the {_writers(facts)} wrote for the task "
            f"**{facts.task}**{source}, each with the label that it reaches."
        )
    return (
        f"{what} They are meant for [distilling step by step](https://arxiv.org/abs/2305.02301): a small student model "
        "learns to write the rationale as well as the label. Made with "
        f"[distill-llm]({_HOME}) {facts.version}."
    )


def _writers(facts: RationaleCardFacts) -> str:
    if not facts.members:
        return f"language model {_code(facts.teacher)}"
    return f"teachers {_join([_code(one.name) for one in facts.members])}"


def _members(facts: RationaleCardFacts) -> str:
    if not facts.members:
        return ""
    head = ("teacher", "model", "licence", "prompt", "samples", "asked", "completed", "kept", "right", "say in votes")
    rows = [
        [
            _code(one.name),
            _code(one.model) + (f", {one.revision[:12]}" if one.revision else ""),
            one.licence or "unknown",
            one.prompt,
            *(f"{count:,}" for count in (one.samples, one.asked, one.completed, one.kept)),
            f"{one.right / one.known:.1%} of {one.known:,}" if one.known else "-",
            f"{one.say:.3g}",
        ]
        for one in facts.members
    ]
    lines = [f"- {_code(one.name)} was dropped: {one.dropped}" for one in facts.members if one.dropped]
    costs = [f"{one.name} {one.cost:,.2f}" for one in facts.members if one.cost]
    lines += [f"- Cost in {facts.currency}: {', '.join(costs)}."] if costs else []
    about = "The column `teacher` says who wrote a completion; a teacher's say is shared out among its completions."
    return "\n\n".join(["### Teachers", _table(head, rows), about, *(["\n".join(lines)] if lines else [])])


def _warnings(facts: RationaleCardFacts) -> str:
    wrote = [(one.model, one.licence) for one in facts.members] or [(facts.teacher, facts.teacher_licence)]
    teachers = [] if facts.from_data else [teacher_restriction(*one) for one in wrote]
    found = list(dict.fromkeys(w for w in (*teachers, data_restriction(facts.task_licence)) if w))
    if not found:
        return ""
    lines = [*found, "Read the terms before you train on these rationales or publish a model trained on them."]
    return "> [!WARNING]\n" + "\n>\n".join(f"> {line}" for line in lines)


def _use(facts: RationaleCardFacts) -> str:
    split = next(iter(facts.splits), "train")
    test = " The split `test` is there to score the teacher: do not train on it." if "test" in facts.splits else ""
    kept = 'lambda row: row["outcome"] == "kept"'
    return (
        "## Use\n\n```python\nfrom datasets import load_dataset\n\n"
        f"rows = load_dataset({json.dumps(facts.repo_id)}, split={json.dumps(split)})\n"
        f"rationales = rows.filter({kept})\n```\n\n"
        f"One row is one completion, whether its rationale was kept or not: the column `outcome` tells.{test}"
    )


def _columns(facts: RationaleCardFacts) -> str:
    return _table(("column", "meaning"), ((_code(name), meaning) for name, meaning in facts.columns.items()))


def _making(facts: RationaleCardFacts) -> str:
    task = [f"- **Task:** {facts.task}{f', from {_code(facts.task_data)}' if facts.task_data else ''}."]
    task.append(f"- **Licence of the task's data:** {facts.task_licence or 'unknown'}.")
    if facts.from_data:
        return "\n".join([*task, "- **Rationales:** those of the data; no model was asked.", _kept(facts)])
    revision = f", revision {_code(facts.teacher_revision)}" if facts.teacher_revision else ""
    lines = [
        f"- **Teacher:** {_code(facts.teacher)}{revision}.",
        f"- **Licence of what the teacher writes:** {facts.teacher_licence or 'unknown'}.",
        *task,
        f"- **Prompt:** {_prompt(facts)}.",
        f"- **Sampling:** {_sampling(facts)}.",
        _kept(facts),
        f"- **Hints:** {_hints(facts)}",
    ]
    return "\n".join(lines)


def _prompt(facts: RationaleCardFacts) -> str:
    exemplars = _count(facts.exemplars, "worked example") if facts.exemplars else "no worked examples"
    style = {"chat": "a chat", "text": "plain text"}.get(facts.prompt_style, facts.prompt_style)
    parts = (style, f"{exemplars} before the question")
    fingerprint = f"; its fingerprint is {_code(facts.prompt_fingerprint)}" if facts.prompt_fingerprint else ""
    return f"{' with '.join(part for part in parts if part)}{fingerprint}"


def _sampling(facts: RationaleCardFacts) -> str:
    settings = [
        _code(f"{name}: {_value(value)}") for name, value in facts.sampling.items() if value not in ("", (), [])
    ]
    return ", ".join([f"{_count(facts.samples, 'completion')} per example", *settings])


def _value(value: str | int | float | Sequence[str]) -> str:
    return str(value) if isinstance(value, int | float) else json.dumps(value, ensure_ascii=False)


def _kept(facts: RationaleCardFacts) -> str:
    if not facts.keep_rules:
        return "- **Kept:** every rationale that is not empty; no rule was set."
    rules = ", then ".join(_code(rule) for rule in facts.keep_rules)
    return f"- **Kept:** rationales that pass {'this rule' if len(facts.keep_rules) == 1 else 'these rules'}: {rules}."


def _hints(facts: RationaleCardFacts) -> str:
    if not facts.hint_samples:
        return "none; the teacher never saw a gold label of the examples."
    return (
        "where no completion of an example reached its gold label, the teacher was shown that label and asked again "
        f"for {_count(facts.hint_samples, 'completion')}. These rows are flagged in the column `hinted`."
    )


def _funnel(splits: Mapping[str, SplitFacts]) -> str:
    reasons = list(dict.fromkeys(reason for split in splits.values() for reason in split.dropped))
    rows: list[tuple[str, list[str]]] = [
        ("examples", [f"{split.examples:,}" for split in splits.values()]),
        ("completions asked for", [f"{split.asked:,}" for split in splits.values()]),
        ("completed", [f"{split.completed:,}" for split in splits.values()]),
        ("label could be read", [f"{split.parsed:,}" for split in splits.values()]),
        ("label is the gold one", ["-" if s.agreed is None else f"{s.agreed:,}" for s in splits.values()]),
        ("**kept**", [f"**{split.kept:,}** ({_percent(split.kept, split.asked)})" for split in splits.values()]),
        *((_dropped(reason), [f"{split.dropped.get(reason, 0):,}" for split in splits.values()]) for reason in reasons),
    ]
    return _table(("", *splits), ((name, *cells) for name, cells in rows), numbers=True)


def _dropped(reason: str) -> str:
    """``reason`` is an outcome of the data set; ``rule: dedupe`` names the rule that was not passed."""
    rule = reason.removeprefix("rule: ")
    return f"dropped by {_code(rule)}" if rule != reason else f"dropped: {reason}"


def _accuracy(splits: Mapping[str, SplitFacts]) -> str:
    known = [
        f"{split.accuracy:.1%} of {_count(split.gold_examples, f'{name} example')}"
        for name, split in splits.items()
        if split.accuracy is not None and split.gold_examples
    ]
    if not known:
        return "No example has a gold label, so nobody knows how often the teacher is right."
    return f"**Teacher's accuracy.** The label that the teacher reached is the gold one for {_join(known)}."


def _ledger(facts: RationaleCardFacts) -> str:
    if facts.requests is None or facts.from_data:
        return ""
    amount = None if facts.cost is None else f"{facts.cost:,.2f}" if facts.cost >= 0.01 else "less than 0.01"
    cost = f" It cost {amount} {facts.currency}".rstrip() + "." if amount else ""
    retries = f", {_count(facts.retries, 'retry', 'retries')} among them" if facts.retries else ""
    return (
        f"**What it took.** {_count(facts.requests, 'request')}{retries}; {_count(facts.tokens_in, 'token')} read and "
        f"{_count(facts.tokens_out, 'token')} written by the teacher.{cost}"
    )


def _limits(facts: RationaleCardFacts) -> str:
    lines = ["Inputs and gold labels are those of the task's data, with its errors and biases."]
    if not facts.from_data:
        lines = [
            "The teacher makes mistakes. A rationale can be wrong in its steps although its label is right, and it is "
            "not an account of how the model came to its answer.",
            "The teacher's biases are in what it wrote, and nothing was filtered for harmful or personal content.",
            *lines,
        ]
    if any(split.agreed is None for split in facts.splits.values()) and not facts.from_data:
        lines.append("Not every split has gold labels: what was kept there was not checked against any.")
    if facts.hint_samples:
        lines.append(
            "A hinted rationale argues for a label that the teacher was told. It can be convincing and made up: leave "
            'such rows out with `row["hinted"]` if you want only what the teacher found by itself.'
        )
    return "\n".join(f"- {line}" for line in lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    """A Markdown table; with ``numbers``, all columns but the first are aligned to the right."""
    rule = ["---", *("---:" if numbers else "---" for _ in head[1:])]
    cells = [[_cell(cell) for cell in row] for row in (head, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:]))


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{text.replace('`', chr(39))}`"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _join(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)
