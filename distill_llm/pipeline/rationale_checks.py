"""Whether a teacher can be asked what a recipe asks, found out before the first request."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import replace

from distill_llm.core.answers import normalise_text
from distill_llm.core.errors import DataError
from distill_llm.core.example import Example, Splits
from distill_llm.rationales.prompts import Exemplar, Prompter, make_prompter
from distill_llm.rationales.spec import RationaleSpec
from distill_llm.tasks.wording import bare_question

_LONGEST = 32  # prompts whose tokens are counted: the longest by characters are hardly ever far from those by tokens


def check_teacher(spec: RationaleSpec, wanted: Mapping[str, Sequence[Example]]) -> None:
    """Raises ConfigError where the teacher, or what a rule needs, cannot be had; DataError for a prompt that is too
    long."""
    prompter = make_prompter(spec.prompt)
    for rule in spec.keep:
        rule.check()
    spec.teacher.check(chat=spec.prompt.style == "chat", sampling=spec.sampling)
    limit = spec.teacher.max_prompt_tokens(spec.sampling)
    if limit is None:
        return
    longest = heapq.nlargest(
        _LONGEST,
        ((split, example) for split, examples in wanted.items() for example in examples),
        key=lambda pair: len(pair[1].prompt),
    )
    counts = spec.teacher.count_tokens([prompter.render(example) for _, example in longest])
    for (split, example), tokens in zip(longest, counts or [], strict=bool(counts)):
        if tokens > limit:
            raise DataError(_too_long(split, example, tokens, limit, prompter))


def _too_long(split: str, example: Example, tokens: int, limit: int, prompter: Prompter) -> str:
    fewer = (
        f"take fewer exemplars (rationales.prompt.num_exemplars, now {len(prompter.exemplars)}), "
        if prompter.exemplars
        else ""
    )
    return (
        f"rationales.prompt: the prompt of example '{example.id}' ({split}) has {tokens:,} tokens, but the teacher "
        f"takes {limit:,} beside its answer. Shorten the input, {fewer}lower rationales.sampling.max_new_tokens, or "
        "choose a teacher with a longer context."
    )


def without_exemplars(exemplars: Sequence[Exemplar], splits: Splits, *, overlap: str, where: str) -> Splits:
    """The splits without examples that stand in a teacher's prompt with their answers.

    Raises DataError for such examples unless the task's ``overlap`` is "drop"; for one of the test split always:
    dropping it would make another test set.
    """
    shown = {normalise_text(exemplar.question) for exemplar in exemplars}
    if not shown:
        return splits
    kept = {}
    for split in ("test", "validation", "train"):
        examples = getattr(splits, split)
        known = [
            example for example in examples if _question(example) in shown or normalise_text(example.input) in shown
        ]
        if known and (split == "test" or overlap == "refuse"):
            drop = "" if split == "test" else ", or set task.overlap=drop to leave these examples out"
            raise DataError(
                f"{where}: {len(known)} of the exemplars' questions are also in the {split} split, such as example "
                f"'{known[0].id}': the teacher would be shown the answer. Choose other exemplars{drop}."
            )
        gone = {example.id for example in known}
        kept[split] = tuple(example for example in examples if example.id not in gone)
    if not kept["train"] or not kept["validation"]:
        raise DataError(f"{where}: nothing is left of a split without the exemplars. Choose other exemplars.")
    left_out = sum(len(getattr(splits, split)) - len(kept[split]) for split in kept)
    return replace(splits, **kept, dropped=splits.dropped + left_out)


def _question(example: Example) -> str:
    return normalise_text(bare_question(example.prompt))
