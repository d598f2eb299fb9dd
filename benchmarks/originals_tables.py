"""The tables of ``originals.py``: what was found here, over seeds, beside what the papers found."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

from schemes import paired_interval, spread

from distill_llm.evaluation.scorecard import Scorecard
from distill_llm.evaluation.text_tables import markdown_table, percent, points_interval, short_bytes

BySeed = Mapping[int, float]
HARD = "labels same steps"
UNBIASED = "student without bias"
FAIR = "fair"
NEAR = 0.003  # of the teacher's accuracy: what "within 0.3 points" means


class Found:
    """What trainings came to: entries of the journal, by their way and seed."""

    def __init__(self, entries: Sequence[Mapping[str, Any]]) -> None:
        self._entries = {(one["way"], one["seed"]): one for one in entries}
        self._cards = {key: Scorecard.model_validate(one["card"]) for key, one in self._entries.items()}

    def __contains__(self, way: str) -> bool:
        return way in self.ways()

    def ways(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self._entries))

    def cards(self, way: str) -> dict[int, Scorecard]:
        return {seed: card for (name, seed), card in self._cards.items() if name == way}

    def accuracy(self, way: str, model: str = "student") -> BySeed:
        return {
            seed: entry.accuracy
            for seed, card in self.cards(way).items()
            for entry in card.entries
            if entry.name == model
        }

    def recall(self, way: str, label: str, model: str = "student") -> BySeed:
        return {
            seed: one.recall[model]
            for seed, card in self.cards(way).items()
            for one in card.classes
            if one.label == label and model in one.recall
        }

    def steps(self, way: str) -> float:
        return next(one["steps"] for (name, _), one in self._entries.items() if name == way)

    def asked(self, teacher: str) -> float:
        """The teacher's accuracy when it is asked for the label alone."""
        return self._entries[f"teacher: {teacher}", 0]["asked"]


def gap(first: BySeed, second: BySeed) -> str:
    """First minus second on the same seeds: mean, in points, and its interval."""
    return paired_interval([first[seed] - second[seed] for seed in first if seed in second])


def over(values: BySeed) -> str:
    return spread(list(values.values())) if values else "-"


def errors(values: BySeed) -> str:
    return over({seed: 1 - value for seed, value in values.items()})


def temperature(found: Found) -> str:
    """Each temperature, for both widths; then 2.5 and 4 against lower and higher ones."""
    ways = _ways(found, r"(wide|narrow), temperature")
    numbers = sorted({float(way.split()[-1]) for way in ways})
    scores = {tuple(way.split(", temperature ")): found.accuracy(way) for way in ways}
    widths = [width for width in ("wide", "narrow") if any(width == key for key, _ in scores)]
    rows = [[f"{one:g}", *(over(scores.get((width, f"{one:g}"), {})) for width in widths)] for one in numbers]
    for name, others in (("2.5 and 4, minus 1", ("1",)), ("2.5 and 4, minus 8 and 20", ("8", "20"))):
        middle = {width: _mean_of(scores, width, ("2.5", "4")) for width in widths}
        beside = {width: _mean_of(scores, width, others) for width in widths}
        if all(middle.values()) and all(beside.values()):
            rows.append([name, *(gap(middle[width], beside[width]) for width in widths)])
    theirs = (
        "Hinton et al. 2015 (MNIST): with 300 or more units in each of two layers all temperatures above 8 were fairly "
        "similar; with 30, those from 2.5 to 4 worked significantly better than higher or lower ones."
    )
    teacher = f"The teacher, asked for the label alone, answers {percent(found.asked('bill'))}%."
    header = ["temperature", *(f"{width} student, accuracy %" for width in widths)]
    return f"{markdown_table(header, rows, numbers_from=1)}\n\n{teacher} {theirs}"


def left_out(found: Found) -> str:
    rows = [["teacher, asked for the label alone", percent(1 - found.asked("bill")), "", "67"]]
    every, without = "all classes", "without fair"
    for name, way, model, theirs in (
        ("hard labels, all classes", every, HARD, "146"),
        ("soft labels, all classes", every, "student", "74"),
        ("hard labels, without `fair`, bias fitted", without, HARD, ""),
        ("soft labels, without `fair`", without, UNBIASED, "206, of them 133 of 1,010 3s"),
        ("soft labels, without `fair`, bias fitted", without, "student", "109, of them 14 of 1,010 3s"),
    ):
        if way in found:
            rows.append([name, errors(found.accuracy(way, model)), over(found.recall(way, FAIR, model)), theirs])
    header = ["student learns from", "errors %", "recall of `fair` %", "errors of 10,000 (Hinton et al. 2015)"]
    lines = [markdown_table(header, rows, numbers_from=1)]
    paired = []
    if every in found:
        paired.append(f"soft minus hard labels, all classes {gap(found.accuracy(every), found.accuracy(every, HARD))}")
    if without in found:
        own, plain, control = (found.accuracy(without, model) for model in ("student", UNBIASED, HARD))
        paired.append(f"the bias {gap(own, plain)}; soft minus hard labels, both with their bias {gap(own, control)}")
        lines.append(f"Offsets: {offsets(found.cards(without))}; theirs +3.5.")
        if every in found:
            paired.append(f"all classes minus without `fair`, bias fitted {gap(found.accuracy(every), own)}")
    lines.append(f"Accuracy, points, paired: {'; '.join(paired)}.")
    return "\n\n".join(lines)


def two_classes(found: Found) -> str:
    way, rows = "low and high only", [["teacher, asked for the label alone", percent(1 - found.asked("bill")), "67"]]
    if way not in found:
        return "Nothing was asked for."
    for name, model, theirs in (
        ("hard labels, bias fitted", HARD, ""),
        ("soft labels", UNBIASED, "47.3%"),
        ("soft labels, bias fitted", "student", "13.2%"),
    ):
        rows.append([name, errors(found.accuracy(way, model)), theirs])
    labels = [one.label for one in next(iter(found.cards(way).values())).classes]
    recall = [[label, *(over(found.recall(way, label, model)) for model in (UNBIASED, "student"))] for label in labels]
    header = ["student learns `low` and `high` alone from", "errors %", "errors (Hinton et al. 2015; 7s and 8s)"]
    own, plain, control = (found.accuracy(way, model) for model in ("student", UNBIASED, HARD))
    return "\n\n".join(
        [
            markdown_table(header, rows, numbers_from=1),
            markdown_table(["recall %", "soft labels", "bias fitted"], recall, numbers_from=1),
            f"Accuracy, paired: the bias {gap(own, plain)}; soft minus hard labels, both with their bias "
            f"{gap(own, control)}. Offsets: {offsets(found.cards(way))}; theirs -7.6 for both.",
        ]
    )


def chain(found: Found) -> str:
    direct = found.accuracy("direct")
    theirs = {
        "labels alone": "41.09",
        "direct": "44.57",
        "chain, nearest": "44.92 (Mirzadeh); 75.04 (Son); about 42 (an unpublished report)",
        "chain, dense": "76.24 (Son); about 45 (an unpublished report)",
        "chain, ensemble": "about 45 (an unpublished report)",
    }
    rows = [["teacher, asked for the label alone", percent(found.asked("deep")), "", "", ""]]
    between = []
    for way in (way for way in theirs if way in found):
        difference = "" if way == "direct" else gap(found.accuracy(way), direct)
        rows.append([way, over(found.accuracy(way)), difference, f"{found.steps(way):g}", theirs[way]])
        names = {entry.name for card in found.cards(way).values() for entry in card.entries} - {"student"}
        between += [[f"{way}: {name}", over(found.accuracy(way, name))] for name in sorted(names)]
    header = ["one layer learns from", "accuracy %", "minus direct", "x the steps", "theirs, accuracy %"]
    lines = [markdown_table(header, rows, numbers_from=1)]
    lines += [markdown_table(["assistant", "accuracy %"], between, numbers_from=1)] if between else []
    return "\n\n".join(lines)


def eight_times(found: Found) -> str:
    rows = []
    for way in _ways(found, "steps$"):
        cards = found.cards(way)
        student, teacher = found.accuracy(way), found.accuracy(way, "teacher")
        gaps = {seed: student[seed] - teacher[seed] for seed in student if seed in teacher}
        each = "; ".join(
            points_interval(one.difference, one.low, one.high)
            for card in cards.values()
            for one in card.comparisons
            if one.other == "teacher"
        )
        sizes = {entry.name: entry.bytes or 0 for card in cards.values() for entry in card.entries}
        ratio = f"{short_bytes(sizes['student'])}, {sizes.get('teacher', 0) / sizes['student']:.1f} x"
        near = "yes" if gaps and mean(gaps.values()) >= -NEAR - 1e-9 else "no"
        rows.append([way, over(student), over(teacher), paired_interval(list(gaps.values())), each, ratio, near])
    header = ["student", "accuracy %", "teacher's %", "minus teacher, over seeds", "over test examples, each seed"]
    header += ["on disk, smaller by", "within 0.3 points"]
    theirs = "A published example: a teacher of 432 MB with 97.0%, a student of 53 MB, 8.2 times smaller, with 96.7%."
    return f"{markdown_table(header, rows, numbers_from=1)}\n\n{theirs}"


def offsets(cards: Mapping[int, Scorecard]) -> str:
    """The label bias of each seed's student, in nats, as its scorecard notes it."""
    said = []
    for card in cards.values():
        note = next((one for one in card.notes if one.startswith("student: label_bias in nats: ")), "")
        said.append(note.removeprefix("student: label_bias in nats: ").split(" (")[0] or "none")
    return "; ".join(said)


def _ways(found: Found, pattern: str) -> list[str]:
    return [way for way in found.ways() if re.search(pattern, way)]


def _mean_of(scores: Mapping[tuple[str, ...], BySeed], width: str, numbers: Sequence[str]) -> BySeed:
    """Each seed's mean over temperatures; empty where one of them is missing."""
    several = [scores.get((width, number), {}) for number in numbers]
    seeds = set.intersection(*(set(one) for one in several))
    return {seed: mean(one[seed] for one in several) for seed in sorted(seeds)}


TABLES: dict[str, Callable[[Found], str]] = {
    "temperature": temperature,
    "left_out": left_out,
    "two_classes": two_classes,
    "chain": chain,
    "eight_times": eight_times,
}
