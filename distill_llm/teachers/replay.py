"""Completions that exist already: lists of texts, rows of files, a Hub data set, or the journal of another run."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from pydantic import Field, model_validator

from distill_llm.core.assets import find_file
from distill_llm.core.component import Component
from distill_llm.core.errors import ConfigError, DataError, TeacherError
from distill_llm.tasks.source import SUFFIXES, USUAL_STEMS, Layout, Row, read_splits, split_files, stream_file
from distill_llm.teachers.base import Completion, Failure, Request, Sampling, TeacherFacts, TextTeacher, TextTeacherSpec

if TYPE_CHECKING:
    from distill_llm.tasks.base import Task

_WHERE = "rationales.teacher"
_ANY_SPLIT = ""
_Samples: TypeAlias = tuple[Completion, ...]
_Part: TypeAlias = tuple[str, bool]  # split, and whether the prompts told the label


class ReplayFiles(Component):
    """For each split of the source: a file, or a pattern such as llm/train_CoT_*.json whose number gives the order."""

    train: str = ""
    validation: str = ""
    test: str = ""


class Replay(TextTeacherSpec):
    """Raw completions in JSON, JSON lines, CSV, Parquet, or a Hub data set: give ``files`` or ``data``.

    Without ``id_field``, row n is the completion of row n of the task's data; a row may be a bare text, or hold a list
    of texts, its samples. With it, a row belongs to the example of that id, and more rows of one id are its samples 0,
    1, ... as they come. ``tokens_in``, ``tokens_out``, ``cut`` and ``hinted`` (the prompt told the label) are read
    where a row has them. So the journal of a run replays as
    ``{data: runs/NAME/rationales/journal.jsonl, id_field: example, split_field: split}``.
    """

    kind: Literal["replay"] = "replay"
    computes: ClassVar[bool] = False
    name: str = Field(default="replayed teacher", description="who wrote them, for tables and cards")
    files: ReplayFiles = ReplayFiles()
    data: str = Field(
        default="", description="in place of `files`: a file, a folder with train.jsonl and the like, or a Hub id"
    )
    text_field: str = Field(default="text", min_length=1, description="where a row has its text, or list of texts")
    id_field: str = Field(default="", description="where a row has its example's id; empty: rows are in order")
    split_field: str = Field(default="", description="where a row has its split; empty: that of its file")

    @model_validator(mode="after")
    def _one_source(self) -> Replay:
        if bool(self.data) == any(self.files.model_dump().values()):
            came = "both came" if self.data else "none came"
            raise ValueError(f"give the completions as `files` or as `data`; {came}")
        return self

    def check(self, *, chat: bool, sampling: Sampling) -> None:
        if sampling.top_logprobs:
            raise ConfigError(
                f"rationales.sampling.top_logprobs: {_WHERE} of kind replay repeats texts and has no "
                "log-probabilities. Set it to 0, or choose a teacher that computes."
            )
        for source in self._sources():
            with _blame(source.where):
                self._read(next(source.rows()), source)

    def open(self, *, task: Task, sampling: Sampling, seed: int) -> TextTeacher:
        kept = _ById() if self.id_field else _InOrder()
        digest = hashlib.sha256()
        for source in self._sources():
            with _blame(source.where):
                for row in source.rows():
                    part, key, samples = self._read(row, source)
                    digest.update(json.dumps([*part, key, [(c.text, c.cut) for c in samples]]).encode())
                    kept.add(part, key, samples)
        return ReplayTeacher(f"replay {self.name} {digest.hexdigest()[:16]}", kept)

    def describe(self) -> TeacherFacts:
        return TeacherFacts(self.name, licence=self.licence)

    def _sources(self) -> Iterator[_Source]:
        stream = partial(stream_file, bare_field=self.text_field)
        for split, pattern in self.files.model_dump().items():
            where = f"{_WHERE}.files.{split}"
            for path in _matches(pattern, where) if pattern else ():
                yield _Source(where, split, partial(stream, path))
        if self.data:
            where, path = f"{_WHERE}.data", find_file(self.data)
            if path is None:
                yield from _hub(self.data, where)
            elif path.is_dir():
                yield from (_Source(where, split, partial(stream, file)) for split, file in _folder(path, where))
            else:  # ids tell splits apart; an order without them can only be one split's
                yield _Source(where, _ANY_SPLIT if self.id_field else "train", partial(stream, path))

    def _read(self, row: Row, source: _Source) -> tuple[_Part, str, _Samples]:
        split = row.text(self.split_field) if self.split_field else source.split
        key = row.text(self.id_field) if self.id_field else ""
        return (split, row.get("hinted") is True), key, _samples(row, self.text_field)


class ReplayTeacher:
    """Gives each request the text that is kept for its example and sample."""

    def __init__(self, identity: str, kept: _InOrder | _ById):
        self.identity = identity
        self._kept = kept

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion | Failure]]:
        for request in requests:
            samples = self._kept.find(request)
            if isinstance(samples, Failure):
                yield request, samples
            elif request.sample < len(samples):
                yield request, samples[request.sample]
            else:
                yield request, self._too_few(request, len(samples))

    def _too_few(self, request: Request, there: int) -> Failure:
        """Raises TeacherError where no example has so many samples: the recipe asks for what is not there at all."""
        if request.sample >= self._kept.most_samples:
            raise TeacherError(
                f"{_WHERE}: sample {request.sample + 1} of example '{request.example.id}' is asked for, but no example "
                f"has more than {self._kept.most_samples} to replay. Lower `rationales.samples`, or give more texts."
            )
        return Failure(
            f"example '{request.example.id}' has {there} texts to replay; sample {request.sample + 1} was asked for"
        )


class _InOrder:
    """Row n of a split is that of the example that its source has in row n."""

    def __init__(self) -> None:
        self.most_samples = 0
        self._parts: dict[_Part, list[_Samples]] = defaultdict(list)

    def add(self, part: _Part, key: str, samples: _Samples) -> None:
        self._parts[part].append(samples)
        self.most_samples = max(self.most_samples, len(samples))

    def find(self, request: Request) -> _Samples | Failure:
        example = request.example
        rows = self._parts.get((example.origin, request.hinted), [])
        if request.hinted and not rows:
            return _nothing_hinted()
        if not 0 <= example.row < len(rows):
            raise TeacherError(
                f"{_WHERE}: the {example.origin} split has a row {example.row + 1}, but only {len(rows)} completions "
                "are there to replay. Give one for every row, in the order of the data, or name the field that has "
                "the examples' ids as `id_field`."
            )
        return rows[example.row]


class _ById:
    """Rows of an id are samples of its example. Splits are the source's, or those that a run made of them."""

    def __init__(self) -> None:
        self.most_samples = 0
        self._parts: dict[_Part, dict[str, _Samples]] = defaultdict(dict)

    def add(self, part: _Part, key: str, samples: _Samples) -> None:
        ids = self._parts[part]
        ids[key] = ids.get(key, ()) + samples
        self.most_samples = max(self.most_samples, len(ids[key]))

    def find(self, request: Request) -> _Samples | Failure:
        example, there = request.example, 0
        for split in dict.fromkeys((example.origin, request.split, _ANY_SPLIT)):
            ids = self._parts.get((split, request.hinted), {})
            if example.id in ids:
                return ids[example.id]
            there += len(ids)
        if request.hinted and not there:
            return _nothing_hinted()
        if not there:
            raise TeacherError(
                f"{_WHERE}: no completions are there to replay for the {request.split} split; those that are there "
                f"are of {sorted({split for split, _ in self._parts})}. Add them, or leave out that split "
                "(`evaluate.teacher=false` spares the test split)."
            )
        return Failure(f"no row has the id '{example.id}'; {there} other ids are there to replay")


def _nothing_hinted() -> Failure:
    return Failure("no completions to prompts that tell the label are there to replay")


@dataclass(frozen=True)
class _Source:
    where: str
    split: str
    rows: Callable[[], Iterator[Row]]


def _samples(row: Row, field: str) -> _Samples:
    """A row's texts; none where its field is null."""
    if field not in row:
        raise DataError(
            f"{row.where}, row {row.number}: the field '{field}' is missing; the row has {sorted(row)}. Name the field "
            "with the completions as `text_field`."
        )
    value = row[field]
    texts = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"{row.where}, row {row.number}: the field '{field}' is {value!r:.80}. Expected a text or a list of texts: "
            "correct the row, or name another field as `text_field`."
        )
    tokens_in, tokens_out = (_counts(row.get(name), len(texts)) for name in ("tokens_in", "tokens_out"))
    cut = row.get("cut") is True and len(texts) == 1
    return tuple(Completion(*one, cut=cut) for one in zip(texts, tokens_in, tokens_out, strict=True))


def _counts(value: object, num_texts: int) -> list[int]:
    """A count for each text, 0 where none is known; one number says nothing of several texts."""
    values = [str(count) for count in (value if isinstance(value, list) else [value])]
    known = len(values) == num_texts
    return [int(count) if count.isdigit() else 0 for count in values] if known else [0] * num_texts


def _hub(name: str, where: str) -> Iterator[_Source]:
    with _blame(where):
        splits = read_splits(name, Layout({}, {split: split for split in USUAL_STEMS}))
    for split, rows in splits.items():
        yield _Source(where, split, partial(iter, rows))


def _folder(path: Path, where: str) -> Iterable[tuple[str, Path]]:
    files = split_files(path, USUAL_STEMS)
    if not files:
        raise ConfigError(
            f"{where}: the folder {path} has no completions. Expected train, validation or test with one of "
            f"{', '.join(SUFFIXES)}; it has {sorted(entry.name for entry in path.iterdir())[:20]}. Rename the files, "
            "or name them under `files`."
        )
    return files.items()


def _matches(pattern: str, where: str) -> list[Path]:
    folder = find_file(str(Path(pattern).parent))
    found = sorted(folder.glob(Path(pattern).name), key=_numbers) if folder is not None else []
    if not found:
        raise ConfigError(f"{where}: no file matches '{pattern}'. Give a path or a pattern relative to where you are.")
    return found


def _numbers(path: Path) -> tuple[list[int], str]:
    """File 10 comes after file 9."""
    return [int(digits) for digits in re.findall(r"\d+", path.name)], path.name


@contextmanager
def _blame(where: str) -> Iterator[None]:
    """What is wrong in a file is said under the recipe's key that names the file."""
    try:
        yield
    except DataError as error:
        raise ConfigError(f"{where}: {error}") from None
