"""A model behind an OpenAI-compatible server: vLLM, SGLang, TGI, llama.cpp, `transformers serve`, or a hosted one."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, JsonValue, field_validator, model_validator

from distill_llm.core.errors import ConfigError, TeacherError
from distill_llm.core.extras import load_extra
from distill_llm.core.files import fingerprint
from distill_llm.models.prompt_tokens import turns
from distill_llm.teachers.asking import Inquiry, Manners, Refused, TryAgain, cause_of, quoted, told_wait
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
    from types import ModuleType

    from distill_llm.tasks.base import Task

_WHERE = "rationales.teacher"
_OURS = re.compile(
    "model|messages|prompt|n|stream|temperature|top_p|max_(completion_)?tokens|stop|seed|(top_)?logprobs"
)
_PROBE_SECONDS = 10.0
_PLACEHOLDER_KEY = "none"  # the client insists on one; a local server does not look at it
_NO_MONEY = frozenset(("insufficient_quota", "billing_hard_limit_reached", "billing_not_active"))
_ABOUT_ONE_PROMPT = re.compile(
    r"(?i)content[ _](filter|policy|management)|context[ _](length|window|size)|too (long|many tokens)|maximum .*length"
)


class OpenAICompatible(TextTeacherSpec):
    """Any server with /v1/chat/completions or /v1/completions. The key stays in the environment.

    A reasoning model's chain of thought (`reasoning_content` or `reasoning`) stands before its answer in the text. A
    server may take what a request does not say, such as top_k, from the model's own generation config, or from its
    own defaults (llama.cpp's Python server has repeat_penalty: 1.1): name such settings under `extra`.
    """

    model_config = ConfigDict(hide_input_in_errors=True)  # somebody may have written a key where its name belongs

    manner: ClassVar[frozenset[str]] = frozenset(
        {
            "base_url",
            "api_key_env",
            "concurrency",
            "timeout_seconds",
            "max_retries",
            "backoff_seconds",
            "tokenizer",
            "context_tokens",
            "max_tokens_field",
        }
    )

    kind: Literal["openai_compatible"] = "openai_compatible"
    model: str = Field(min_length=1, description="as the server calls it")
    base_url: str = Field(default="https://api.openai.com/v1", description="a local one: http://localhost:8000/v1")
    api: Literal["chat", "completions"] = "chat"
    api_key_env: str = Field(default="OPENAI_API_KEY", description="NAME of the environment variable with the key")
    revision: str = Field(default="", description="which weights these are, in your words; part of what is recorded")
    concurrency: int = Field(default=8, gt=0, le=1000, description="requests in flight at once")
    timeout_seconds: float = Field(default=120.0, gt=0, description="for one attempt")
    max_retries: int = Field(default=6, ge=0, description="of one request, where another attempt may succeed")
    backoff_seconds: float = Field(default=0.5, gt=0, description="longest first wait; it doubles up to a minute")
    context_tokens: int = Field(default=0, ge=0, description="prompt and completion together; 0: unknown")
    tokenizer: str = Field(default="", description="Hub id or folder that counts a dry run's tokens; empty: unknown")
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    extra: dict[str, JsonValue] = Field(
        default={}, description="more fields of each request: chat_template_kwargs, ..."
    )

    @model_validator(mode="before")
    @classmethod
    def _without_key(cls, data: Any) -> Any:
        found = [name for name in ("api_key", "key", "token") if isinstance(data, Mapping) and name in data]
        if found:
            raise ValueError(
                f"'{found[0]}' has no place in a recipe, which is stored and shared. Put the key into an environment "
                "variable, and the variable's name into `api_key_env`"
            )
        return data

    @field_validator("base_url")
    @classmethod
    def _plain_url(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            credentials, _ = "@" in parts.netloc, parts.port  # a port that is no number is found out by reading it
        except ValueError:
            raise ValueError("not a URL; expected one such as http://localhost:8000/v1") from None
        if credentials:
            raise ValueError(
                "a URL with a user name or password in it would be stored with the recipe; take them out, and put the "
                "key into the environment variable that `api_key_env` names"
            )
        if parts.query or parts.fragment:
            raise ValueError("expected a URL without `?` or `#`, such as http://localhost:8000/v1")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected a URL that begins with http:// or https://, such as http://localhost:8000/v1")
        return url.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _name_of_variable(cls, name: str) -> str:
        like_a_key = re.fullmatch(r"(?=.*[a-z])(?=.*\d)\w{24,}", name)
        if like_a_key or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(
                "expected the NAME of an environment variable, such as OPENAI_API_KEY; what came is no such name (not "
                "repeated here, for it may be the key itself: then make a new one, and never write it in a recipe)"
            )
        return name

    @field_validator("extra")
    @classmethod
    def _not_ours(cls, extra: dict[str, JsonValue]) -> dict[str, JsonValue]:
        taken = sorted(filter(_OURS.fullmatch, extra))
        if taken:
            raise ValueError(
                f"{taken} are set by the toolkit. Use the teacher's own fields and `rationales.sampling` for them"
            )
        return extra

    def check(self, *, chat: bool, sampling: Sampling) -> None:
        openai = load_extra("openai", "openai", where=_WHERE)
        if chat and self.api == "completions":
            raise ConfigError(
                f"{_WHERE}.api: the completions API takes plain text, but the prompts are chats. Set api: chat, or "
                "write prompts as text."
            )
        room = self.max_prompt_tokens(sampling)
        if room is not None and room <= 0:
            raise ConfigError(
                f"{_WHERE}.context_tokens: {self.context_tokens} leave no room for a prompt beside "
                f"sampling.max_new_tokens = {sampling.max_new_tokens}. Raise the one or lower the other."
            )
        key = self._key()
        client = openai.OpenAI(
            api_key=key or _PLACEHOLDER_KEY, base_url=self.base_url, timeout=_PROBE_SECONDS, max_retries=1
        )
        with client:
            self._probe(client, openai, key)

    def _probe(self, client: Any, openai: ModuleType, key: str) -> None:
        """Asks which models there are, which is free. Many a good server has no such list."""
        try:
            answer = client.models.with_raw_response.list()
        except openai.APITimeoutError as error:
            if type(error.__cause__).__name__ != "ConnectTimeout":
                return
            raise self._unreachable(error, key) from None
        except openai.APIConnectionError as error:
            raise self._unreachable(error, key) from None
        except openai.APIStatusError as error:
            if error.status_code in (401, 403):
                raise ConfigError(_about_key(self, error.status_code, _reason(error, key), key)) from None
            return
        try:
            names = [str(entry["id"]) for entry in json.loads(answer.content)["data"]]
        except (ValueError, LookupError, TypeError):
            return
        is_path = self.model.startswith((".", "/", "~"))  # `transformers serve` takes folders that it does not list
        if names and self.model not in names and not is_path:
            near = difflib.get_close_matches(self.model, names, n=1, cutoff=0.0)
            raise ConfigError(
                f"{_WHERE}.model: {self.base_url} has no model '{self.model}'. Did you mean '{near[0]}'? It has "
                f"{len(names)}, such as {names[:5]}."
            )

    def _unreachable(self, error: Exception, key: str) -> ConfigError:
        return ConfigError(
            f"{_WHERE}.base_url: cannot connect to {self.base_url} ({cause_of(error, key)}). Start the server, or "
            "correct the address; it ends in /v1 for most servers."
        )

    def _key(self) -> str:
        """The key, or nothing where the variable is not set."""
        key = os.environ.get(self.api_key_env, "").strip()
        if not all("!" <= character <= "~" for character in key):
            raise ConfigError(
                f"{_WHERE}.api_key_env: the value of {self.api_key_env} holds characters that no key has, such as a "
                "space, a line end or a letter with an accent. Set it again."
            )
        return key

    def count_tokens(self, prompts: Sequence[Prompt]) -> list[int] | None:
        if not self.tokenizer:
            return None
        from distill_llm.models.load import read_tokenizer

        tokenizer = read_tokenizer(self.tokenizer, where=f"{_WHERE}.tokenizer")
        if self.api == "completions":
            texts = [prompt for prompt in prompts if isinstance(prompt, str)]
            return [len(ids) for ids in tokenizer(texts)["input_ids"]] if len(texts) == len(prompts) else None
        if not tokenizer.chat_template:
            return None
        settings = self.extra.get("chat_template_kwargs")
        options = {"add_generation_prompt": True, "tokenize": False} | (settings if isinstance(settings, dict) else {})
        texts = [tokenizer.apply_chat_template(_messages(prompt), **options) for prompt in prompts]
        # the template has written the special tokens already
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []

    def max_prompt_tokens(self, sampling: Sampling) -> int | None:
        return self.context_tokens - sampling.max_new_tokens if self.context_tokens else None

    def request_fields(self, request: Request, sampling: Sampling) -> dict[str, Any]:
        """What is sent for one request, but for the model."""
        sent: dict[str, Any] = {"temperature": sampling.temperature, self.max_tokens_field: sampling.max_new_tokens}
        if self.api == "chat":
            sent["messages"] = _messages(request.prompt)
        else:
            sent["prompt"] = request.prompt
        if sampling.temperature > 0:  # top_p is sent even at 1: a server may have another default
            sent |= {"top_p": sampling.top_p, "seed": int(request.key, 16) % 2**31}
        if sampling.stop:
            sent["stop"] = list(sampling.stop)
        if sampling.top_logprobs:
            chat = {"logprobs": True, "top_logprobs": sampling.top_logprobs}
            sent |= chat if self.api == "chat" else {"logprobs": sampling.top_logprobs}
        return sent | self.extra

    def open(self, *, task: Task, sampling: Sampling, seed: int) -> TextTeacher:
        return OpenAICompatibleTeacher(self, sampling, self._key(), load_extra("openai", "openai", where=_WHERE))

    def describe(self) -> TeacherFacts:
        return TeacherFacts(self.model, revision=self.revision, licence=self.licence)


class OpenAICompatibleTeacher:
    """Asks as the recipe says; see ``Inquiry`` for what an interruption does."""

    def __init__(self, spec: OpenAICompatible, sampling: Sampling, key: str, openai: ModuleType):
        extra = f" {fingerprint(spec.extra)}" if spec.extra else ""
        self.identity = f"{spec.model}@{spec.revision} {spec.api}{extra}"
        self._spec, self._sampling, self._key, self._openai = spec, sampling, key, openai

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion | Failure]]:
        spec = self._spec
        manners = Manners(spec.concurrency, spec.timeout_seconds, spec.max_retries, spec.backoff_seconds)
        return Inquiry(self._connect, manners).answers(requests)

    def _connect(self) -> _Connection:
        return _Connection(self._spec, self._sampling, self._key, self._openai)


class _Connection:
    """The client, in one event loop. Its own retries are off: they know neither the other requests nor an interrupt."""

    def __init__(self, spec: OpenAICompatible, sampling: Sampling, key: str, openai: ModuleType):
        self._spec, self._sampling, self._key, self._openai = spec, sampling, key, openai
        self._client = openai.AsyncOpenAI(
            api_key=key or _PLACEHOLDER_KEY, base_url=spec.base_url, timeout=spec.timeout_seconds, max_retries=0
        )

    async def close(self) -> None:
        await self._client.close()

    async def attempt(self, request: Request, retries: int) -> Completion:
        chat = self._spec.api == "chat"
        place = self._client.chat.completions if chat else self._client.completions
        fields = self._spec.request_fields(request, self._sampling)
        required = {name: fields.pop(name) for name in ("messages", "prompt") if name in fields}
        try:
            answer = await place.with_raw_response.create(model=self._spec.model, **required, extra_body=fields)
        except self._openai.APITimeoutError:
            raise TimeoutError from None
        except self._openai.APIStatusError as error:
            raise self._verdict(error) from None
        except self._openai.APIConnectionError as error:
            reason = f"the connection to {self._spec.base_url} failed ({cause_of(error, self._key)})."
            raise TryAgain(reason) from None
        except UnicodeEncodeError:
            raise Refused("the prompt holds characters that cannot be sent (half of a pair).", alone=True) from None
        return self._read(answer.content, retries)

    def _verdict(self, error: Any) -> Exception:
        """What an HTTP status above 399 means for this request and for all others."""
        status, reason = error.status_code, _reason(error, self._key)
        codes = {str(error.code), str(error.type)}
        if status in (401, 403):
            return TeacherError(_about_key(self._spec, status, reason, self._key))
        if status == 404 or "model_not_found" in codes:
            return TeacherError(
                f"{_WHERE}: {self._spec.base_url} does not have what was asked for, model '{self._spec.model}' through "
                f"api: {self._spec.api} (HTTP {status}: {reason}). Correct `model`, `api` or `base_url` (.../v1)."
            )
        if status == 402 or codes & _NO_MONEY:
            return TeacherError(
                f"{_WHERE}: the account at {self._spec.base_url} is not paid for any more (HTTP {status}: {reason}). "
                "Add credit, then type the same command again; what was answered is kept."
            )
        told = told_wait(error.response.headers)
        if status in (408, 409, 429) or status >= 500:
            all_wait = status == 429 or (status == 503 and told is not None)
            return TryAgain(f"HTTP {status}: {reason}", told_seconds=told, all_wait=all_wait)
        text = " ".join((*codes, reason))
        return Refused(f"HTTP {status}: {reason}", alone=_ABOUT_ONE_PROMPT.search(text) is not None)

    def _read(self, content: bytes, retries: int) -> Completion:
        try:
            answer = json.loads(content)
            choice = answer["choices"][0]
            message = choice["message"] if self._spec.api == "chat" else choice
            end = choice.get("finish_reason")
            text = _text_of(message, self._sampling.stop)
        except (ValueError, LookupError, TypeError, AttributeError):
            shown = quoted(content.decode("utf-8", "replace"), self._key)
            raise TryAgain(f"the server's answer is no completion: {shown!r}.") from None
        if end == "content_filter":
            raise Refused("the server's content filter stopped the completion (finish_reason).", alone=True)
        if text is None and end != "length":
            raise TryAgain(f"the server's answer holds no text (finish_reason {quoted(str(end), self._key)}).")
        usage = answer["usage"] if isinstance(answer.get("usage"), Mapping) else {}
        return Completion(
            text or "",
            tokens_in=usage.get("prompt_tokens") or 0,
            tokens_out=usage.get("completion_tokens") or 0,
            cut=end == "length",
            retries=retries,
            scores=self._scores(choice) if self._sampling.top_logprobs else None,
        )

    def _scores(self, choice: Mapping[str, Any]) -> TokenScores:
        try:
            return _token_scores(choice["logprobs"], self._sampling.top_logprobs)
        except (LookupError, TypeError, AttributeError):
            raise TeacherError(
                f"{_WHERE}: {self._spec.base_url} gives no log-probabilities (or in a form that is not OpenAI's), but "
                f"sampling.top_logprobs is {self._sampling.top_logprobs}. Set sampling.top_logprobs: 0, or take "
                "another server."
            ) from None


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else turns(prompt)


def _text_of(message: Mapping[str, Any], stops: Sequence[str]) -> str | None:
    """The chain of thought where the server tells it apart, then the answer up to a stop string; None without both."""
    thought = message.get("reasoning_content") or message.get("reasoning")
    answer = next((message[name] for name in ("content", "text", "refusal") if message.get(name) is not None), None)
    for stop in stops:
        answer = answer and answer.split(stop)[0]
    parts = [part.strip() for part in (thought, answer) if part is not None]
    return "\n".join(part for part in parts if part) if parts else None


def _token_scores(found: Mapping[str, Any], count: int) -> TokenScores:
    """The scores of a chat completion (one entry a token), or of a plain one (parallel lists).

    Beside the ``count`` likeliest tokens, some servers give the one that was written.
    """
    places = found.get("content")
    if places is None:
        tops = [dict(place or {}) for place in found["top_logprobs"]]
        tokens, logprobs = found["tokens"], found["token_logprobs"]
    else:
        tops = [{top["token"]: top["logprob"] for top in place["top_logprobs"]} for place in places]
        tokens, logprobs = [place["token"] for place in places], [place["logprob"] for place in places]
    best = [sorted(place.items(), key=lambda top: -top[1])[:count] for place in tops]
    return TokenScores(
        tuple(str(token) for token in tokens),
        tuple(float(logprob) for logprob in logprobs),
        tuple(tuple(token for token, _ in place) for place in best),
        tuple(tuple(float(logprob) for _, logprob in place) for place in best),
    )


def _about_key(spec: OpenAICompatible, status: int, reason: str, key: str) -> str:
    state = "was refused" if key else "is not set"
    return (
        f"{_WHERE}.api_key_env: {spec.base_url} refuses access (HTTP {status}: {reason}). The key in the environment "
        f"variable {spec.api_key_env} {state}. Set it to a key that may use model '{spec.model}', or name another "
        "variable in `api_key_env`."
    )


def _reason(error: Any, key: str) -> str:
    """What the server says is wrong, without the key."""
    body = error.body
    if isinstance(body, Mapping):
        body = body.get("message") or body.get("detail") or json.dumps(body)
    return quoted(str(body or error.message), key)
