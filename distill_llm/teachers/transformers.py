"""A local or Hub model that writes rationales through transformers."""

from __future__ import annotations

import functools
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from pydantic import Field

from distill_llm.core.errors import ConfigError, TeacherError
from distill_llm.core.files import fingerprint
from distill_llm.teachers.base import (
    Completion,
    Failure,
    Prompt,
    Request,
    Sampling,
    TeacherFacts,
    TextTeacher,
    TextTeacherSpec,
    TokenScores,
)

if TYPE_CHECKING:
    from distill_llm.models.generate import Generator, Written
    from distill_llm.tasks.base import Task

Answer: TypeAlias = tuple[Request, Completion | Failure]
Asked: TypeAlias = tuple[Request, list[int]]

_WHERE = "rationales.teacher"
_WINDOW_BATCHES, _WINDOW_ROWS = 64, 8192  # sorted together; the rows bound what is in memory at once
_TOKENIZER_FILES = (".json", ".jinja", ".model", ".txt")
_log = logging.getLogger(__name__)


class TransformersTeacher:
    """Windows of requests, each sorted by length, the longest first: what does not fit in memory fails at once.

    ``load`` gives the generator; it is called at the first question, so that a finished journal costs no weights.
    ``longest``: tokens of a prompt that leaves room for a completion, None where there is no limit.
    """

    def __init__(
        self,
        load: Callable[[], Generator],
        encode: Callable[[Sequence[Prompt]], list[list[int]]],
        *,
        identity: str,
        batch_rows: int,
        longest: int | None,
        continuous: bool,
    ):
        self.identity = identity
        self._load, self._encode = functools.cache(load), encode
        self._batch_rows, self._longest, self._continuous = batch_rows, longest, continuous
        self._window_rows = max(batch_rows, min(_WINDOW_BATCHES * batch_rows, _WINDOW_ROWS))

    def complete(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """What came of each request; a prompt that is too long is a Failure, and costs nothing."""
        source = iter(requests)
        refused: deque[Answer] = deque()
        write = self._write_continuously if self._continuous else self._write_in_batches
        for answer in write(self._windows(source, refused)):
            while refused:
                yield refused.popleft()
            yield answer
        yield from refused

    def _windows(self, source: Iterator[Request], refused: deque[Answer]) -> Iterator[list[Asked]]:
        """Requests with their tokens, a window at a time; those that are too long go to ``refused``."""
        while window := list(itertools.islice(source, self._window_rows)):
            fitting = []
            for request, ids in zip(window, self._encode([request.prompt for request in window]), strict=True):
                longest = len(ids) if self._longest is None else self._longest
                if len(ids) > longest:
                    reason = f"the prompt has {len(ids):,} tokens, the model takes {longest:,}"
                    refused.append((request, Failure(reason)))
                elif not ids:
                    refused.append((request, Failure("the prompt has no tokens")))
                else:
                    fitting.append((request, ids))
            yield sorted(fitting, key=lambda asked: -len(asked[1]))

    def _write_continuously(self, windows: Iterator[list[Asked]]) -> Iterator[Answer]:
        for request, written in self._load().write_continuously(itertools.chain.from_iterable(windows)):
            yield request, Failure(written) if isinstance(written, str) else _completion(written)

    def _write_in_batches(self, windows: Iterator[list[Asked]]) -> Iterator[Answer]:
        for window in windows:
            if window:
                self._load().share_prefix([ids for _, ids in window])
            start = 0
            while start < len(window):
                batch = window[start : start + self._batch_rows]
                written = self._write_or_halve(batch)
                if written is not None:
                    yield from zip((request for request, _ in batch), map(_completion, written), strict=True)
                    start += len(batch)

    def _write_or_halve(self, batch: list[Asked]) -> list[Written] | None:
        """None where the batch did not fit in the GPU's memory: from then on batches are half as large."""
        import torch

        try:
            return self._load().write_ids([ids for _, ids in batch], [request.key for request, _ in batch])
        except torch.cuda.OutOfMemoryError as error:
            if len(batch) == 1:
                raise TeacherError(
                    f"{_WHERE}: one prompt of {len(batch[0][1]):,} tokens does not fit in the GPU's memory. Use a "
                    "smaller model or max_new_tokens, `dtype: bfloat16`, or `load_in: 8bit` or `4bit`."
                ) from error
        torch.cuda.empty_cache()
        self._batch_rows = max(1, len(batch) // 2)
        _log.warning(
            "%s.batch_rows: %d rows do not fit in the GPU's memory; going on with %d.",
            _WHERE,
            len(batch),
            self._batch_rows,
        )
        return None


class Transformers(TextTeacherSpec):
    """Encoder-decoder or decoder-only, from the Hub or a folder; on a GPU where there is one."""

    kind: Literal["transformers"] = "transformers"
    tells_ids: ClassVar[bool] = True
    manner: ClassVar[frozenset[str]] = frozenset({"device", "batch_rows", "batching"})

    model: str = Field(min_length=1, description="Hub id or folder")
    revision: str = Field(default="main", description="branch, tag or commit on the Hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: that of the weights"
    )
    load_in: Literal["full", "8bit", "4bit"] = Field(
        default="full", description="8bit and 4bit quantize the weights through bitsandbytes"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:NUMBER or mps; auto: a GPU where one is")
    batch_rows: int = Field(default=32, gt=0, description="halved by itself where a batch does not fit in the GPU")
    batching: Literal["auto", "static", "continuous"] = Field(
        default="auto", description="continuous: a prompt takes the place of each that ends; greedy, decoder-only"
    )
    max_input_tokens: int = Field(default=0, ge=0, description="of a prompt; 0: what the model can take")

    def check(self, *, chat: bool, sampling: Sampling) -> None:
        from distill_llm.models.load import check_bits, choose_device
        from distill_llm.models.quantize import can_be_read
        from distill_llm.models.vision import is_mixed, is_vision

        choose_device(self.device, where=f"{_WHERE}.device")
        check_bits(self.model, self.load_in, where=f"{_WHERE}.load_in")
        can_be_read(self._config(), where=f"{_WHERE}.model")
        if is_vision(self._config()) or is_mixed(self._config()):
            raise ConfigError(
                f"{_WHERE}.model: '{self.model}' reads pictures, and a prompt is text. Choose a model that reads text; "
                "this one can teach by soft labels (`teachers`, kind frozen, with `view.picture`)."
            )
        longest = self.max_prompt_tokens(sampling)
        if longest is not None and longest < 1:
            raise ConfigError(
                f"rationales.sampling.max_new_tokens: {sampling.max_new_tokens:,} leaves no room for a prompt in "
                f"'{self.model}', whose context holds {longest + sampling.max_new_tokens:,} tokens. Ask for fewer."
            )
        reason = self._why_not_continuous(sampling)
        if self.batching == "continuous" and reason:
            raise ConfigError(f"{_WHERE}.batching: continuous batching does not go with {reason}. Use `auto`.")
        if chat and not self._tokenizer().chat_template:
            raise ConfigError(
                f"{_WHERE}.model: the tokenizer of '{self.model}' has no chat template, but the prompts are chats. Set "
                "rationales.prompt.style: text, or choose a model that was tuned for chat."
            )

    def vocabulary(self) -> dict[str, int]:
        return self._tokenizer().get_vocab()

    def count_tokens(self, prompts: Sequence[Prompt]) -> list[int]:
        return [len(ids) for ids in self._encode(prompts)]

    def max_prompt_tokens(self, sampling: Sampling) -> int | None:
        from distill_llm.models.load import context_tokens

        config = self._config()
        longest = context_tokens(config)
        if longest is not None and not config.is_encoder_decoder:
            longest -= sampling.max_new_tokens
        if not self.max_input_tokens:
            return longest
        return self.max_input_tokens if longest is None else min(self.max_input_tokens, longest)

    def open(self, *, task: Task, sampling: Sampling, seed: int) -> TextTeacher:
        return TransformersTeacher(
            lambda: self._generator(sampling),
            self._encode,
            identity=self._identity(),
            batch_rows=self.batch_rows,
            longest=self.max_prompt_tokens(sampling),
            continuous=self._is_continuous(sampling),
        )

    def describe(self) -> TeacherFacts:
        from distill_llm.models.card import licence_of
        from distill_llm.models.folder import weight_bytes
        from distill_llm.models.load import count_parameters, revision_of

        return TeacherFacts(
            self.model,
            count_parameters(self.model, self.revision, where=f"{_WHERE}.model"),
            weight_bytes(self.model),
            revision_of(self.model, self.revision, where=f"{_WHERE}.model"),
            self.licence or licence_of(self.model, self.revision),
        )

    def _identity(self) -> str:
        """All that decides the text but the prompt and the sampling."""
        from distill_llm.models.load import weights_of

        weights = weights_of(self.model, self.revision, where=f"{_WHERE}.model")
        template = self._tokenizer().chat_template
        chat = f" template {fingerprint(template)}" if template else ""
        return f"{weights} {self.dtype} {self.load_in}{chat}"

    def _why_not_continuous(self, sampling: Sampling) -> str:
        reasons = {
            "an encoder-decoder": self._config().is_encoder_decoder,
            "a temperature above 0": sampling.temperature > 0,
            "top_logprobs": sampling.top_logprobs > 0,
            "stop texts": bool(sampling.stop),
            f"load_in: {self.load_in}": self.load_in != "full",
        }
        return " and ".join(reason for reason, holds in reasons.items() if holds)

    def _is_continuous(self, sampling: Sampling) -> bool:
        """On a CPU it is at a third of the speed of batches, and elsewhere it is left to models that surely can."""
        if self.batching != "auto":
            return self.batching == "continuous"
        from distill_llm.models.load import choose_device
        from distill_llm.models.prefix import has_plain_attention

        on_gpu = choose_device(self.device, where=f"{_WHERE}.device").startswith("cuda")
        return on_gpu and has_plain_attention(self._config()) and not self._why_not_continuous(sampling)

    def _generator(self, sampling: Sampling) -> Generator:
        from distill_llm.models.generate import Generator
        from distill_llm.models.load import choose_device, load_on

        device = choose_device(self.device, where=f"{_WHERE}.device")
        model = load_on(
            device, self.model, self.revision, where=f"{_WHERE}.model", dtype=self.dtype, load_in=self.load_in
        )
        settings = sampling.model_dump(include={"max_new_tokens", "temperature", "top_p", "stop", "top_logprobs"})
        return Generator(model, self._tokenizer(), **settings)

    def _encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        from distill_llm.models.prompt_tokens import prompt_ids

        tokenizer = self._tokenizer()
        known = {prompt: prompt_ids(tokenizer, prompt) for prompt in dict.fromkeys(prompts)}
        return [known[prompt] for prompt in prompts]

    def _config(self) -> Any:
        from distill_llm.models.load import read_config

        return read_config(self.model, self.revision, where=f"{_WHERE}.model")

    def _tokenizer(self) -> Any:
        files = (path for path in Path(self.model).expanduser().glob("*") if path.suffix in _TOKENIZER_FILES)
        return _read_tokenizer(self.model, self.revision, tuple(sorted((f.name, f.stat().st_mtime_ns) for f in files)))


@functools.lru_cache(maxsize=4)
def _read_tokenizer(model: str, revision: str, _stamps: tuple[tuple[str, int], ...]) -> Any:
    """Kept while the files of a folder keep their times."""
    from distill_llm.models.load import read_tokenizer

    return read_tokenizer(model, revision, where=f"{_WHERE}.model")


def _completion(written: Written) -> Completion:
    scores = None
    if written.scores is not None:
        steps = written.scores
        scores = TokenScores(written.ids, tuple(steps.logprobs), tuple(steps.top_tokens), tuple(steps.top_logprobs))
    return Completion(written.text, written.tokens_in, written.tokens_out, written.cut, scores=scores)
