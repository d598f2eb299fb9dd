"""Whether a teacher can be asked what a recipe asks, found out before the first request."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import replace

from distill_llm.core.answers import normalise_text
from distill_llm.core.errors import ConfigError, DataError
from distill_llm.core.example import Example, Splits
from distill_llm.rationales.prompts import Exemplar, Prompter, make_prompter
from distill_llm.rationales.spec import RationaleSpec
from distill_llm.rationales.voices import Voice
from distill_llm.tasks.wording import bare_question

_LONGEST = 32  # prompts whose tokens are counted: the longest by characters are hardly ever far from those by tokens


def check_teacher(spec: RationaleSpec, wanted: Mapping[str, Sequence[Example]]) -> dict[str, str]:
    """Raises ConfigError where the teacher, or what a rule needs, cannot be had; DataError for a prompt that is too
    long. Gives the names of those of several that cannot be had where the recipe allows it, and why."""
    for rule in spec.keep:
        rule.check()
    measured = [e for split in ("train", "validation") for e in wanted.get(split, ()) if e.label is not None]
    if spec.weighs_by_accuracy and not measured:
        raise ConfigError(
            "rationales.teacher.weigh_by: accuracy is measured on labelled train or validation examples, and there are "
            "none. Give labelled validation data, or set weigh_by: fixed, with a `weight` for each teacher."
        )
    failing: dict[str, str] = {}
    for voice in spec.voices:
        try:
            voice.teacher.check(chat=voice.prompt.style == "chat", sampling=voice.sampling)
            longest = voice.teacher.max_prompt_tokens(voice.sampling)
        except ConfigError as error:
            if not spec.drops_failing:
                raise _in_the_name_of(voice, error) from None
            failing[voice.name] = str(error)
            continue
        if longest is not None:
            _check_lengths(voice, longest, wanted)
    if not any(voice.votes and voice.name not in failing for voice in spec.voices) and failing:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failing.items())
        raise ConfigError(f"rationales.teacher: none of the teachers can be had. {reasons}")
    return failing


def _in_the_name_of(voice: Voice, error: ConfigError) -> ConfigError:
    return ConfigError(f"rationales.teacher.of.{voice.name}: {error}") if voice.name else error


def _check_lengths(voice: Voice, limit: int, wanted: Mapping[str, Sequence[Example]]) -> None:
    prompter = make_prompter(voice.prompt, where=voice.prompt_where)
    longest = heapq.nlargest(
        _LONGEST,
        ((split, example) for split, examples in wanted.items() for example in examples),
        key=lambda pair: len(pair[1].prompt),
    )
    counts = voice.teacher.count_tokens([prompter.render(example) for _, example in longest])
    for (split, example), tokens in zip(longest, counts or [], strict=bool(counts)):
        if tokens > limit:
            raise DataError(_too_long(split, example, tokens, limit, prompter, voice.prompt_where))


def _too_long(split: str, example: Example, tokens: int, limit: int, prompter: Prompter, where: str) -> str:
    fewer = (
        f"take fewer exemplars ({where}.num_exemplars, now {len(prompter.exemplars)}), " if prompter.exemplars else ""
    )
    return (
        f"{where}: the prompt of example '{example.id}' ({split}) has {tokens:,} tokens, but the teacher "
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
