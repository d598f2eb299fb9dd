"""What asking a teacher would come to, found out without asking it anything."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from distill_llm.core.errors import ConfigError
from distill_llm.core.example import Example
from distill_llm.core.journal import keys_of
from distill_llm.pipeline.rationale_stage import check, make_asker, wanted_splits
from distill_llm.pipeline.run_folder import RunFolder
from distill_llm.rationales.prompts import make_prompter, prompt_text
from distill_llm.rationales.spec import RationaleSpec
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
    wrong. ``most_cost`` is None where the recipe gives no prices; it leaves hinted requests out."""

    prompt: str
    example_id: str
    tokens_a_request: tuple[int, int, int]
    exact: bool
    splits: tuple[SplitPreview, ...]
    most_hinted: int
    most_cost: float | None
    currency: str


def preview_rationales(recipe: Recipe) -> Preview:
    """One rendered prompt, tokens a request (least, mean, most), requests and cost. Writes nothing, asks nothing."""
    if recipe.rationales is None:
        raise ConfigError(f"recipe {recipe.name} has no `rationales` section: there is no teacher to ask.")
    spec, splits = recipe.rationales, check(recipe, student=False)
    asker, done = make_asker(recipe, spec), keys_of(RunFolder(recipe.folder).journals())
    prompter = make_prompter(spec.prompt)
    everything: list[int] = []
    parts = []
    exact = True
    for split, examples in wanted_splits(recipe, splits).items():
        prompts = [prompter.render(example) for example in _sample(examples)]
        counts, exact = _count(spec, prompts)
        everything += counts
        requests = answered = 0
        for example in examples:
            made = asker.requests(example, split)
            requests += len(made)
            answered += sum(int(request.key, 16) in done for request in made)
        left = requests - answered
        parts.append(
            SplitPreview(
                split,
                requests,
                answered,
                round(left * statistics.fmean(counts)),
                left * spec.sampling.max_new_tokens,
            )
        )
    example = splits.train[0]
    hinted = [e for e in splits.train if e.label is not None] if spec.hint_retry is not None else []
    return Preview(
        prompt=prompt_text(prompter.render(example)),
        example_id=example.id,
        tokens_a_request=(min(everything), round(statistics.fmean(everything)), max(everything)),
        exact=exact,
        splits=tuple(parts),
        most_hinted=len(hinted) * (spec.hint_retry.samples if spec.hint_retry else 0),
        most_cost=_most_cost(spec, parts),
        currency=spec.prices.currency,
    )


def _sample(examples: Sequence[Example]) -> Sequence[Example]:
    return random.Random(0).sample(examples, _SAMPLE) if len(examples) > _SAMPLE else examples


def _count(spec: RationaleSpec, prompts: Sequence[Prompt]) -> tuple[list[int], bool]:
    counted = spec.teacher.count_tokens(prompts)
    if counted is not None:
        return counted, True
    return [len(prompt_text(prompt)) // _CHARACTERS_A_TOKEN + 1 for prompt in prompts], False


def _most_cost(spec: RationaleSpec, parts: Sequence[SplitPreview]) -> float | None:
    if not spec.prices.known:
        return None
    return spec.prices.cost(sum(part.tokens_in for part in parts), sum(part.most_tokens_out for part in parts))
