"""What asking a teacher would come to, found out without asking it anything."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from distill_llm.core.errors import ConfigError
from distill_llm.core.example import Example
from distill_llm.core.journal import keys_of
from distill_llm.pipeline.asking import HINTED_SPLIT
from distill_llm.pipeline.rationale_checks import check_teacher
from distill_llm.pipeline.rationale_stage import check, is_gathered, make_asker, wanted_splits
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.rationales.prompts import make_prompter, prompt_text
from distill_llm.rationales.spec import RationaleSpec
from distill_llm.rationales.voices import Voice
from distill_llm.recipe.recipe import Recipe
from distill_llm.teachers.base import Prompt

_SAMPLE = 256  # prompts that are counted
_CHARACTERS_A_TOKEN = 4  # of English; only where the teacher's tokenizer is not at hand


@dataclass(frozen=True, slots=True)
class SplitPreview:
    """Requests of one split, and what those that are not answered yet would take at most."""

    split: str
    requests: int
    answered: int
    tokens_in: int
    most_tokens_out: int


@dataclass(frozen=True, slots=True)
class Preview:
    """``exact``: tokens were counted by the teacher's tokenizer. ``most_hinted``: further requests, if all votes were
    wrong; ``most_hint_cost``: theirs, not in ``most_cost``. Both costs are None where the recipe gives no prices.
    ``failing``: teachers that cannot be had now, and why, where the recipe drops them; ``problem``: why those that it
    needs cannot."""

    prompt: str
    example_id: str
    tokens_a_request: tuple[int, int, int]
    exact: bool
    splits: tuple[SplitPreview, ...]
    most_hinted: int
    most_cost: float | None
    currency: str
    most_hint_cost: float | None = None
    failing: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""


def preview_rationales(recipe: Recipe) -> Preview:
    """One rendered prompt, tokens a request (least, mean, most), requests and cost. Writes nothing, asks nothing."""
    if recipe.rationales is None:
        raise ConfigError(f"recipe {recipe.name} has no `rationales` section: there is no teacher to ask.")
    spec, splits = recipe.rationales, check(recipe, student=False, teacher=False)
    wanted = wanted_splits(recipe, splits)
    failing, problem = _cannot_be_had(recipe, spec, wanted)
    asker, done = make_asker(recipe, spec), keys_of(RunFolder(recipe.folder).journals())
    speakers = [speaker for speaker in asker.speakers if speaker.voice.name not in failing and not speaker.dropped]
    if not speakers:
        raise ConfigError(problem or next(speaker.dropped for speaker in asker.speakers if speaker.dropped))
    labelled = sum(example.label is not None for example in splits.train)
    hints = labelled * spec.hint_retry.samples if spec.hint_retry is not None else 0  # of each teacher
    everything: list[int] = []
    parts = []
    exact, most_cost, hint_cost = True, 0.0, 0.0
    for split, examples in wanted.items():
        for speaker in speakers:
            if speaker not in asker.speakers_of(split):
                continue
            voice = speaker.voice
            prompter = make_prompter(voice.prompt, where=voice.prompt_where)
            counts, counted = _count(voice, [prompter.render(example) for example in _sample(examples)])
            exact = exact and counted
            everything += counts
            requests = [int(r.key, 16) for example in examples for r in speaker.requests(example, split)]
            answered = sum(key in done for key in requests)
            left = len(requests) - answered
            tokens_in, most_out = round(left * statistics.fmean(counts)), left * voice.sampling.max_new_tokens
            name = f"{split}, {voice.name}" if voice.name else split
            parts.append(SplitPreview(name, len(requests), answered, tokens_in, most_out))
            most_cost += voice.prices.cost(tokens_in, most_out)
            if split == HINTED_SPLIT:
                hint_cost += voice.prices.cost(hints * statistics.fmean(counts), hints * voice.sampling.max_new_tokens)
    prompter = make_prompter(speakers[0].voice.prompt, where=speakers[0].voice.prompt_where)
    example = splits.train[0]
    priced = any(voice.prices.known for voice in spec.voices)
    return Preview(
        prompt=prompt_text(prompter.render(example)),
        example_id=example.id,
        tokens_a_request=(min(everything), round(statistics.fmean(everything)), max(everything)),
        exact=exact,
        splits=tuple(parts),
        most_hinted=hints * len(speakers),
        most_cost=most_cost if priced else None,
        most_hint_cost=hint_cost if priced else None,
        currency=next((voice.prices.currency for voice in spec.voices if voice.prices.known), spec.prices.currency),
        failing=failing,
        problem=problem,
    )


def _cannot_be_had(
    recipe: Recipe, spec: RationaleSpec, wanted: Mapping[str, Sequence[Example]]
) -> tuple[dict[str, str], str]:
    """Which teachers may fail and do, and why asking would end at once: a server may not run yet, nor a key be there,
    when somebody wants to know what asking would cost."""
    if not spec.drops_failing and is_gathered(recipe, RunFolder(recipe.folder)):
        return {}, ""
    try:
        return check_teacher(spec, wanted), ""
    except ConfigError as error:
        return {}, str(error)


def _sample(examples: Sequence[Example]) -> Sequence[Example]:
    return random.Random(0).sample(examples, _SAMPLE) if len(examples) > _SAMPLE else examples


def _count(voice: Voice, prompts: Sequence[Prompt]) -> tuple[list[int], bool]:
    counted = voice.teacher.count_tokens(prompts)
    if counted is not None:
        return counted, True
    return [len(prompt_text(prompt)) // _CHARACTERS_A_TOKEN + 1 for prompt in prompts], False
