"""A decoder-only model that writes through vLLM, in this process or in one replica for each process of torchrun.

Written against vLLM's documented offline API (`LLM`, `SamplingParams`, `RequestOutput`; 0.11 and later) and tested with
a stand-in of those classes. It has not been run on a GPU by its writers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from distill_llm.core.errors import ConfigError, TeacherError
from distill_llm.core.extras import load_extra, need
from distill_llm.core.processes import world_size
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
    from distill_llm.tasks.base import Task

_WHERE = "rationales.teacher"
_WINDOW = 1024  # requests at a time: enough to fill the engine, few enough to lose little when it is killed
_TEMPLATE_TOKENS = 512  # more than a chat template adds to what is said
_USUAL_MAX_LOGPROBS = 20  # vLLM refuses more unless it is told at the start
_LAUNCHER = re.compile(r"TORCHELASTIC_\w+|MASTER_(ADDR|PORT)|ROLE_NAME|((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)")


class Vllm(TextTeacherSpec):
    """A model from the Hub or a folder on one or more GPUs; `pip install 'distill-llm[vllm]'`, on Linux.

    Prompts that begin alike share their cache. Completions come back in windows of 1,024 requests. For more replicas
    (``data_parallel_size``) start the command with torchrun, one process a replica: each takes its own share of the
    requests, and ``tensor_parallel_size`` GPUs of its own.
    """

    kind: Literal["vllm"] = "vllm"
    manner: ClassVar[frozenset[str]] = frozenset({"tensor_parallel_size", "data_parallel_size", "gpu_memory_fraction"})
    tells_ids: ClassVar[bool] = True
    model: str = Field(min_length=1, description="Hub id or folder")
    revision: str = "main"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: str = Field(
        default="", description="such as fp8 or bitsandbytes; empty: as the model's config says, awq and gptq included"
    )
    tensor_parallel_size: int = Field(default=1, gt=0, description="GPUs that hold one replica together")
    data_parallel_size: int = Field(default=1, gt=0, description="replicas: as many as torchrun starts processes")
    gpu_memory_fraction: float = Field(default=0.9, gt=0, le=1, description="share of a GPU's memory that it may take")
    context_tokens: int = Field(default=0, ge=0, description="prompt and completion together; 0: the model's own")

    def check(self, *, chat: bool, sampling: Sampling) -> None:
        from distill_llm.models.folder import is_adapter
        from distill_llm.models.load import read_config, read_tokenizer

        need("vllm", "vllm", where=_WHERE)
        config = read_config(self.model, self.revision, where=f"{_WHERE}.model")
        if config.is_encoder_decoder:
            raise ConfigError(
                f"{_WHERE}.model: '{self.model}' is an encoder-decoder, and vLLM runs decoder-only models. Choose "
                "another model, or `kind: transformers`."
            )
        if is_adapter(self.model):
            raise ConfigError(
                f"{_WHERE}.model: '{self.model}' is an adapter, and vLLM is given whole models here. Merge it into its "
                "base first, or choose `kind: transformers`."
            )
        if chat and not read_tokenizer(self.model, self.revision, where=f"{_WHERE}.model").chat_template:
            raise ConfigError(
                f"{_WHERE}.model: '{self.model}' has no chat template, so that it cannot read a chat. Choose an "
                "instruction-tuned model, or plain prompts."
            )
        limit = self.max_prompt_tokens(sampling)
        if limit is not None and limit < 1:
            raise ConfigError(
                f"{_WHERE}.context_tokens: {limit + sampling.max_new_tokens} tokens leave no room for a prompt beside "
                f"rationales.sampling.max_new_tokens ({sampling.max_new_tokens}). Raise the one or lower the other."
            )

    def vocabulary(self) -> dict[str, int]:
        from distill_llm.models.load import read_tokenizer

        return read_tokenizer(self.model, self.revision, where=f"{_WHERE}.model").get_vocab()

    def count_tokens(self, prompts: Sequence[Prompt]) -> list[int] | None:
        from distill_llm.models.load import read_tokenizer
        from distill_llm.models.prompt_tokens import prompt_ids

        tokenizer = read_tokenizer(self.model, self.revision, where=f"{_WHERE}.model")
        return [len(prompt_ids(tokenizer, prompt)) for prompt in prompts]

    def max_prompt_tokens(self, sampling: Sampling) -> int | None:
        context = self.context()
        return context - sampling.max_new_tokens if context else None

    def context(self) -> int:
        """Tokens of prompt and completion together; 0 where the config does not tell."""
        from distill_llm.models.load import read_config

        config = read_config(self.model, self.revision, where=f"{_WHERE}.model").get_text_config()
        return self.context_tokens or getattr(config, "max_position_embeddings", None) or 0

    def open(self, *, task: Task, sampling: Sampling, seed: int) -> TextTeacher:
        from distill_llm.models.load import weights_of

        processes = world_size()
        if processes != self.data_parallel_size:
            raise ConfigError(
                f"{_WHERE}.data_parallel_size: {self.data_parallel_size} replicas need as many processes, and "
                f"{processes} {'is' if processes == 1 else 'are'} running. Start the command with torchrun "
                f"--nproc-per-node {self.data_parallel_size}, or set data_parallel_size={processes}."
            )
        made_of = [weights_of(self.model, self.revision, where=f"{_WHERE}.model"), self.dtype]
        identity = " ".join([*made_of, self.quantization] if self.quantization else made_of)
        return VllmTeacher(lambda: self._load(sampling, seed), identity, sampling)

    def _load(self, sampling: Sampling, seed: int) -> _Engine:
        from distill_llm.models.load import read_tokenizer

        with _alone(self.tensor_parallel_size):
            vllm = load_extra("vllm", "vllm", where=_WHERE)
            try:
                llm = vllm.LLM(
                    model=str(Path(self.model).expanduser()) if self.model.startswith("~") else self.model,
                    revision=self.revision,
                    tokenizer_revision=self.revision,
                    dtype=self.dtype,
                    quantization=self.quantization or None,
                    tensor_parallel_size=self.tensor_parallel_size,
                    gpu_memory_utilization=self.gpu_memory_fraction,
                    max_model_len=self.context_tokens or None,
                    max_logprobs=max(_USUAL_MAX_LOGPROBS, sampling.top_logprobs),
                    enable_prefix_caching=True,
                    seed=seed,
                )
            except (ValueError, RuntimeError, OSError) as error:
                raise TeacherError(
                    f"{_WHERE}: vLLM cannot load '{self.model}': {error} Check the model's name, and the memory of the "
                    "GPU: fewer `context_tokens`, another `gpu_memory_fraction` or a larger `tensor_parallel_size` "
                    "may help."
                ) from error
        tokenizer = read_tokenizer(self.model, self.revision, where=f"{_WHERE}.model")
        return _Engine(llm, vllm.SamplingParams, tokenizer, self.context())

    def describe(self) -> TeacherFacts:
        from distill_llm.models.folder import weight_bytes
        from distill_llm.models.load import count_parameters, revision_of

        where, is_folder = f"{_WHERE}.model", Path(self.model).expanduser().is_dir()
        return TeacherFacts(
            self.model,
            count_parameters(self.model, self.revision, where=where),
            weight_bytes(self.model),
            "" if is_folder else revision_of(self.model, self.revision, where=where),
            self.licence,
        )


@dataclass(frozen=True)
class _Engine:
    llm: Any
    sampling_params: Callable[..., Any]
    tokenizer: Any
    context: int


class VllmTeacher:
    """Hands the engine a window of requests at a time; it schedules them itself.

    ``load`` gives the engine; it is called at the first question, so that a finished journal costs no weights.
    """

    def __init__(self, load: Callable[[], _Engine], identity: str, sampling: Sampling):
        self.identity = identity
        self._load, self._sampling = load, sampling
        self._engine: _Engine | None = None

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion | Failure]]:
        waiting = iter(requests)
        while window := list(islice(waiting, _WINDOW)):
            engine = self._engine = self._engine or self._load()
            fitting: list[Request] = []
            for request in window:
                failure = _too_long(request, engine)
                if failure is None:
                    fitting.append(request)
                else:
                    yield request, failure
            yield from self._written(fitting, engine)

    def _written(self, requests: Sequence[Request], engine: _Engine) -> Iterator[tuple[Request, Completion | Failure]]:
        from distill_llm.models.prompt_tokens import turns

        texts = [request for request in requests if isinstance(request.prompt, str)]
        chats = [request for request in requests if not isinstance(request.prompt, str)]
        for some, ask, prompts in (
            (texts, engine.llm.generate, [request.prompt for request in texts]),
            (chats, engine.llm.chat, [turns(chat.prompt) for chat in chats if not isinstance(chat.prompt, str)]),
        ):
            if some:
                params = [self._params(request, engine) for request in some]
                outputs = ask(prompts, sampling_params=params, use_tqdm=False)
                for request, output in zip(some, outputs, strict=True):
                    yield request, _result(output, self._sampling.top_logprobs)

    def _params(self, request: Request, engine: _Engine) -> Any:
        """The key draws: the same request gives the same text, whatever it shares a window with."""
        drawn = self._sampling.temperature > 0
        return engine.sampling_params(
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p if drawn else 1.0,
            max_tokens=self._sampling.max_new_tokens,
            stop=list(self._sampling.stop) or None,
            seed=int(request.key, 16) % 2**31 if drawn else None,
            logprobs=self._sampling.top_logprobs or None,
        )


def _too_long(request: Request, engine: _Engine) -> Failure | None:
    """vLLM would refuse the whole window. Prompts of fewer bytes than there is room for tokens are not counted."""
    from distill_llm.models.prompt_tokens import prompt_ids

    prompt = request.prompt
    said = prompt if isinstance(prompt, str) else "".join(message.content for message in prompt)
    if not engine.context or len(said.encode()) + _TEMPLATE_TOKENS < engine.context:
        return None
    count = len(prompt_ids(engine.tokenizer, prompt))
    if count < engine.context:
        return None
    return Failure(f"the prompt has {count} tokens, and the model reads {engine.context} with the completion")


def _result(output: Any, top: int) -> Completion | Failure:
    """What vLLM's RequestOutput says, which holds one completion."""
    written = output.outputs[0]
    if written.finish_reason in ("abort", "error"):
        return Failure(f"vLLM ended it early ({written.finish_reason})")
    return Completion(
        written.text.strip(),
        tokens_in=len(output.prompt_token_ids or ()),
        tokens_out=len(written.token_ids),
        cut=written.finish_reason == "length",
        scores=_scores(written, top) if top else None,
    )


def _scores(written: Any, top: int) -> TokenScores:
    """vLLM tells, for each place, the likeliest tokens and the one that it wrote, which may be none of them."""
    tokens = tuple(written.token_ids)
    best = [sorted(place.items(), key=lambda item: -item[1].logprob)[:top] for place in written.logprobs]
    return TokenScores(
        tokens,
        tuple(float(place[token].logprob) for token, place in zip(tokens, written.logprobs, strict=True)),
        tuple(tuple(token for token, _ in place) for place in best),
        tuple(tuple(float(score.logprob) for _, score in place) for place in best),
    )


@contextmanager
def _alone(gpus: int) -> Iterator[None]:
    """While the engine starts, this process of torchrun sees its own GPUs only, and nothing of torchrun.

    A replica that finds torchrun's variables would wait for the other processes to join it, for ever.
    """
    if world_size() == 1:
        yield
        return
    devices = _own_devices(gpus)
    hidden = {name: value for name, value in os.environ.items() if _LAUNCHER.fullmatch(name)}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        for name in hidden:
            del os.environ[name]
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
        yield
    finally:
        os.environ.update(hidden)
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


def _own_devices(gpus: int) -> str:
    """The GPUs of this process: the so-manieth ``gpus`` of those that all of this machine's processes may use."""
    import torch

    place = int(os.environ.get("LOCAL_RANK", "0"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = [str(i) for i in range(torch.cuda.device_count())] if visible is None else visible.split(",")
    own = there[place * gpus : (place + 1) * gpus]
    if len(own) < gpus:
        raise ConfigError(
            f"{_WHERE}: process {place} of this machine needs {gpus} GPUs behind those of the processes before it, but "
            f"the machine offers {len(there)}. Start fewer processes, or lower `tensor_parallel_size`."
        )
    return ",".join(own)
