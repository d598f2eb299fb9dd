"""The teacher behind an OpenAI-compatible server: what it sends, reads, retries, gives up, and never repeats."""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import threading
import time
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from distill_llm.core.errors import ConfigError, TeacherError
from distill_llm.core.example import Example
from distill_llm.tasks.jsonl import Jsonl
from distill_llm.teachers import asking
from distill_llm.teachers.asking import backoff, quoted, told_wait
from distill_llm.teachers.base import Completion, Failure, Message, Request, Sampling
from distill_llm.teachers.openai_compatible import OpenAICompatible
from tests.servers import (
    FaultyProxy,
    ModelServer,
    body,
    chat_logprobs,
    cut_off,
    drip,
    echo_key,
    hang,
    likeliest,
    reset,
    status,
    truncated,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from distill_llm.models.load import LoadedModel
    from distill_llm.teachers.base import Prompt

pytest.importorskip("openai")

TASK = Jsonl.model_validate({"data": "nowhere.jsonl", "fields": {"input": ["q"]}})
KEY = "sk-proj-Secret0123456789"
TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}{{ mark or 'so' }}"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with ModelServer() as running:
        yield running


def _spec(server: Any = None, **fields: Any) -> OpenAICompatible:
    """A teacher at ``server`` that waits milliseconds where it would wait half seconds."""
    url = {} if server is None else {"base_url": server.url}
    usual: dict[str, Any] = {"model": "tiny", "api_key_env": "TEST_KEY", "backoff_seconds": 0.002, "concurrency": 4}
    return OpenAICompatible.model_validate(usual | url | fields)


def _requests(*prompts: Prompt) -> list[Request]:
    facts: dict[str, Any] = {"input": "", "prompt": "", "origin": "train"}
    return [
        Request(
            f"{0xABCDEF01F3456700 + number:016x}", Example(id=f"e{number}", row=number, **facts), "train", 0, prompt
        )
        for number, prompt in enumerate(prompts)
    ]


def _ask(spec: OpenAICompatible, requests: Iterable[Request], **sampling: Any) -> Iterator[tuple[Request, Any]]:
    teacher = spec.open(task=TASK, sampling=Sampling.model_validate(sampling), seed=0)
    return teacher.complete(requests)


def _one(spec: OpenAICompatible, prompt: Prompt = "hello", **sampling: Any) -> Any:
    ((_, outcome),) = _ask(spec, _requests(prompt), **sampling)
    return outcome


def _outcomes(spec: OpenAICompatible, count: int, **sampling: Any) -> list[Any]:
    """One outcome a request, in the order of the requests."""
    asked = _requests(*(f"p{number}" for number in range(count)))
    found = {request.key: outcome for request, outcome in _ask(spec, asked, **sampling)}
    assert len(found) == count
    return [found[request.key] for request in asked]


# What is sent, and what is read


def test_plain_prompt_becomes_the_users_message_and_sampling_goes_along(server: ModelServer) -> None:
    found = _one(_spec(server), "what is 2 + 2 ?", max_new_tokens=7, stop=("\n\n", "Q:"))
    assert found == Completion("re: what is 2 + 2 ?", tokens_in=6, tokens_out=7)
    (seen,) = server.seen
    assert seen.path == "/v1/chat/completions"
    assert seen.body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "what is 2 + 2 ?"}],
        "temperature": 0.0,
        "max_tokens": 7,
        "stop": ["\n\n", "Q:"],
    }
    assert seen.headers["authorization"] == f"Bearer {KEY}"


def test_chat_keeps_its_turns_and_a_drawn_sample_has_the_seed_of_its_key(server: ModelServer) -> None:
    chat = (Message("system", "be brief"), Message("user", "2 + 2"), Message("assistant", "4"), Message("user", "3?"))
    spec = _spec(server, extra={"top_k": -1}, max_tokens_field="max_completion_tokens")
    assert _one(spec, chat, temperature=0.7).text == "re: 3?"
    sent = server.seen[0].body
    assert [(turn["role"], turn["content"]) for turn in sent["messages"]] == [
        ("system", "be brief"),
        ("user", "2 + 2"),
        ("assistant", "4"),
        ("user", "3?"),
    ]
    assert sent["seed"] == int("abcdef01f3456700", 16) % 2**31 == 0x73456700
    assert (sent["temperature"], sent["top_p"], sent["top_k"], sent["max_completion_tokens"]) == (0.7, 1.0, -1, 256)


def test_completions_api_sends_plain_text(server: ModelServer) -> None:
    assert _one(_spec(server, api="completions"), "Q: 2 + 2\nA:").text == "re: Q: 2 + 2\nA:"
    assert server.seen[0].path == "/v1/completions"
    assert server.seen[0].body == {"model": "tiny", "prompt": "Q: 2 + 2\nA:", "temperature": 0.0, "max_tokens": 256}


@pytest.mark.parametrize(
    ("message", "text", "cut"),
    [
        ({"content": "  4 \n"}, "4", False),
        ({"content": "4\nQ: next"}, "4", False),  # the server left the stop string in
        ({"content": "The sum", "finish_reason": "length"}, "The sum", True),
        ({"content": "4", "reasoning_content": "2 + 2\n"}, "2 + 2\n4", False),
        ({"content": "4", "reasoning": "two Q: and two"}, "two Q: and two\n4", False),
        ({"content": None, "reasoning": "so many", "finish_reason": "length"}, "so many", True),
        ({"content": None, "finish_reason": "length"}, "", True),
        ({"content": ""}, "", False),
        ({"content": None, "refusal": "I cannot."}, "I cannot.", False),
    ],
)
def test_text_of_a_message(message: dict[str, Any], text: str, cut: bool) -> None:
    with ModelServer(lambda _: message) as server:
        found = _one(_spec(server, max_retries=0), stop=("Q:",))
    assert (found.text, found.cut) == (text, cut)


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_scores_are_those_that_the_server_gave(server: ModelServer, api: str) -> None:
    server.answer = lambda _: "the sum is"
    scores = _one(_spec(server, api=api), top_logprobs=3).scores
    assert scores.tokens == ("the", "sum", "is")
    assert scores.logprobs == (-0.25, -0.25, -0.25)
    assert scores.top_tokens[1] == ("sum", "sum~1", "sum~2") == tuple(likeliest("sum", 3))
    assert scores.top_logprobs[1] == (-0.25, -1.25, -2.25)
    sent = server.seen[0].body
    assert (sent["logprobs"], sent.get("top_logprobs")) == ((True, 3) if api == "chat" else (3, None))


def test_the_token_that_was_drawn_is_not_one_of_the_likeliest_because_a_server_adds_it(server: ModelServer) -> None:
    """llama.cpp's does: the drawn token first, then the k that were asked for."""
    drawn = {"tokens": ["c"], "token_logprobs": [-4.0], "top_logprobs": [{"c": -4.0, "b": -1.0, "a": -0.5}]}
    server.logprobs = False
    server.answer = lambda _: {"text": "c", "logprobs": drawn}
    scores = _one(_spec(server, api="completions"), top_logprobs=2).scores
    assert (scores.tokens, scores.logprobs) == (("c",), (-4.0,))
    assert (scores.top_tokens, scores.top_logprobs) == ((("a", "b"),), ((-0.5, -1.0),))


def test_plain_completion_may_have_scores_in_the_form_of_a_chat(server: ModelServer) -> None:
    server.logprobs = False
    server.answer = lambda _: {"text": "a b", "logprobs": chat_logprobs(["a", "b"], 1)}
    assert _one(_spec(server, api="completions"), top_logprobs=1).scores.top_tokens == (("a",), ("b",))


def test_server_that_ignores_log_probabilities_is_found_out_at_the_first_completion(server: ModelServer) -> None:
    server.logprobs = False
    with pytest.raises(TeacherError, match=r"gives no log-probabilities.*sampling\.top_logprobs: 0"):
        list(_ask(_spec(server, concurrency=1), _requests("a", "b", "c"), top_logprobs=2))
    assert len(server.seen) == 1


def test_answer_without_usage_counts_no_tokens(server: ModelServer) -> None:
    with FaultyProxy(server.url, [body({"choices": [{"message": {"content": "4"}}]})]) as proxy:
        assert _one(_spec(proxy)) == Completion("4")


# Many at once


def test_requests_are_taken_as_there_is_room_and_in_the_callers_thread(server: ModelServer) -> None:
    server.gate.clear()
    taken: list[threading.Thread] = []

    def source() -> Iterator[Request]:
        for request in _requests(*(f"p{number}" for number in range(20))):
            taken.append(threading.current_thread())
            yield request

    answers = _ask(_spec(server, concurrency=3), source())
    threading.Timer(0.2, lambda: (waiting.append(len(taken)), server.gate.set())).start()
    waiting: list[int] = []
    next(answers)
    assert waiting == [3]
    assert len(taken) == 3
    assert len(list(answers)) == 19
    assert server.most_at_once == 3
    assert set(taken) == {threading.current_thread()}


def test_result_is_there_before_slower_ones_end(server: ModelServer) -> None:
    slow = threading.Event()
    server.answer = lambda body: str(body["messages"][0]["content"] != "p0" or slow.wait(10))
    answers = _ask(_spec(server, concurrency=2), _requests("p0", "p1", "p2"))
    first = [next(answers)[0].prompt, next(answers)[0].prompt]
    slow.set()
    assert first == ["p1", "p2"]
    assert [request.prompt for request, _ in answers] == ["p0"]


def test_budget_that_ends_the_iterable_early_loses_nothing(server: ModelServer) -> None:
    spent = 0

    def source() -> Iterator[Request]:
        for request in _requests(*(f"p{number}" for number in range(50))):
            if spent >= 5:
                return
            yield request

    found = []
    for request, _ in _ask(_spec(server, concurrency=2), source()):
        spent += 1
        found.append(request.prompt)
    assert len(found) == len(server.seen) <= 7
    assert sorted(found) == sorted(seen.body["messages"][0]["content"] for seen in server.seen)


def test_no_request_starts_no_thread_for_long_and_asks_nothing(server: ModelServer) -> None:
    assert list(_ask(_spec(server), [])) == []
    assert server.seen == []
    assert not [thread for thread in threading.enumerate() if thread.name == "asking"]


def test_closing_ends_at_once_although_the_server_hangs(server: ModelServer) -> None:
    before = set(threading.enumerate())
    with FaultyProxy(server.url, [None, *[hang] * 10]) as proxy:
        answers = _ask(_spec(proxy, concurrency=2), _requests("a", "b", "c", "d"))
        next(answers)
        started = time.monotonic()
        answers.close()  # type: ignore[attr-defined]
        assert time.monotonic() - started < 2
        assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "asking"]


# Ctrl-C


def _press_ctrl_c(when: Callable[[], bool], *, times: int = 1, then: Callable[[], None] | None = None) -> None:
    """From another thread: once ``when`` holds, and a while later (again, or ``then``)."""

    def press() -> None:
        while not when():
            time.sleep(0.01)
        for _ in range(times):
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        if then is not None:
            then()

    threading.Thread(target=press, daemon=True).start()


def test_interrupt_still_gives_what_is_in_flight_and_asks_nothing_more(server: ModelServer) -> None:
    server.gate.clear()
    answers = _ask(_spec(server, concurrency=3), _requests(*"abcdef"))
    found = []
    _press_ctrl_c(lambda: len(server.seen) == 3, then=server.gate.set)
    with pytest.raises(KeyboardInterrupt):
        found.extend((request.prompt, outcome.text) for request, outcome in answers)
    assert sorted(found) == [("a", "re: a"), ("b", "re: b"), ("c", "re: c")]
    assert len(server.seen) == 3


def test_interrupt_does_not_wait_for_what_was_not_answered(server: ModelServer) -> None:
    """A request that waits for another attempt is not paid for."""
    with FaultyProxy(server.url, [status(429, headers={"Retry-After": "300"})]) as proxy:
        answers = _ask(_spec(proxy), _requests("a"))
        _press_ctrl_c(lambda: proxy.arrivals == 1)
        started = time.monotonic()
        _, outcome = next(answers)
        with pytest.raises(KeyboardInterrupt):
            next(answers)
    assert isinstance(outcome, Failure)
    assert "Stopped before it was asked again: HTTP 429" in outcome.reason
    assert time.monotonic() - started < 3


def test_second_interrupt_ends_at_once(server: ModelServer) -> None:
    server.gate.clear()
    _press_ctrl_c(lambda: len(server.seen) == 2, times=2)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(_ask(_spec(server), _requests("a", "b")))
    assert time.monotonic() - started < 3
    assert not [thread for thread in threading.enumerate() if thread.name == "asking"]


def test_interrupt_that_met_the_caller_can_be_handed_on(server: ModelServer) -> None:
    answers: Any = _ask(_spec(server, concurrency=2), _requests(*"abcdef"))
    first, _ = next(answers)
    second, outcome = answers.throw(KeyboardInterrupt())
    assert {first.prompt, second.prompt} == {"a", "b"}
    assert outcome.text == f"re: {second.prompt}"
    with pytest.raises(KeyboardInterrupt):
        next(answers)


# Retries

PASSING = {
    "429": status(429),
    "408": status(408),
    "409": status(409),
    "500": status(500),
    "503 in plain text": lambda proxy, handler, content: handler.reply(503, b"busy", {"Content-Type": "text/plain"}),
    "reset": reset,
    "truncated JSON": truncated,
    "cut off": cut_off,
    "not JSON": body(b"<html>one moment</html>"),
    "a list": body(b"[]"),
    "no choices": body({"choices": []}),
    "an error with status 200": body({"error": {"message": "upstream is busy", "code": 502}}),
    "null content": body({"choices": [{"message": {"role": "assistant", "content": None}, "finish_reason": "stop"}]}),
    "no content": body({"choices": [{"message": {"role": "assistant"}, "finish_reason": "stop"}]}),
}


@pytest.mark.parametrize("name", PASSING)
def test_fault_that_passes_is_retried(server: ModelServer, name: str) -> None:
    with FaultyProxy(server.url, [PASSING[name], PASSING[name]]) as proxy:
        assert _one(_spec(proxy)) == Completion("re: hello", tokens_in=1, tokens_out=2, retries=2)
        assert proxy.arrivals == 3


def test_attempt_that_takes_too_long_is_ended_and_retried(server: ModelServer) -> None:
    with FaultyProxy(server.url, [hang, drip]) as proxy:
        assert _one(_spec(proxy, timeout_seconds=0.4)).retries == 2


def test_fault_that_stays_is_a_failure_with_the_servers_reason(server: ModelServer) -> None:
    with FaultyProxy(server.url, lambda _: status(500)) as proxy:
        found = _one(_spec(proxy, max_retries=3))
        assert proxy.arrivals == 4
    assert found == Failure("given up after 3 retries: HTTP 500: made-up fault 500", retries=3)


def test_server_that_is_gone_is_a_failure_that_names_it(server: ModelServer) -> None:
    with ModelServer() as gone:
        url = gone.url
    found = _one(_spec(base_url=url, max_retries=1))
    assert isinstance(found, Failure)
    assert url in found.reason
    assert "ConnectError" in found.reason


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, 0.0),
        ({}, None),
    ],
)
def test_wait_that_a_server_tells(headers: dict[str, str], seconds: float | None) -> None:
    assert told_wait(headers) == seconds


def test_wait_until_a_date() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    assert told_wait({"retry-after": date}) == pytest.approx(90, abs=1.5)


def test_waits_double_up_to_a_minute_and_are_drawn_from_their_whole_range() -> None:
    for retries, longest in [(0, 0.5), (1, 1.0), (3, 4.0), (7, 60.0), (5000, 60.0)]:
        drawn = [backoff(retries, 0.5) for _ in range(400)]
        assert max(drawn) <= longest
        assert max(drawn) > 0.9 * longest
        assert min(drawn) < 0.1 * longest


def test_wait_that_a_server_tells_is_kept_to(server: ModelServer) -> None:
    with FaultyProxy(server.url, [status(503, headers={"Retry-After": "0.4"})]) as proxy:
        started = time.monotonic()
        assert _one(_spec(proxy)).retries == 1
        assert 0.4 <= time.monotonic() - started < 1.5


def test_wait_of_more_than_ten_minutes_is_given_up(server: ModelServer) -> None:
    with FaultyProxy(server.url, [status(429, headers={"Retry-After": "3600"})]) as proxy:
        found = _one(_spec(proxy))
    assert isinstance(found, Failure)
    assert "asks to wait 3600 seconds, more than ten minutes: HTTP 429" in found.reason


def test_busy_server_holds_back_all_requests(server: ModelServer) -> None:
    """Only the first request meets the 429, but none is sent until the wait is over."""
    times: list[float] = []

    def note(_: dict[str, Any]) -> None:
        times.append(time.monotonic())

    def faults(sent: dict[str, Any]) -> Any:
        note(sent)
        return status(429, headers={"retry-after-ms": "500"}) if len(times) == 1 else None

    with FaultyProxy(server.url, faults) as proxy:
        asked = _requests(*(f"p{number}" for number in range(6)))
        late = itertools.chain(asked[:1], (time.sleep(0.15) or request for request in asked[1:]))
        assert all(isinstance(outcome, Completion) for _, outcome in _ask(_spec(proxy, concurrency=2), late))
    assert len(times) == 7
    assert min(times[1:]) - times[0] >= 0.49


# What is given up


def test_refusal_of_one_request_is_its_failure_alone(server: ModelServer) -> None:
    error = {"error": {"message": "flagged", "code": "content_filter"}}

    def faults(sent: dict[str, Any]) -> Any:
        return status(400, error) if sent["messages"][0]["content"] == "p3" else None

    with FaultyProxy(server.url, faults) as proxy:
        found = _outcomes(_spec(proxy), 6)
        assert proxy.arrivals == 6
    assert found[3] == Failure("HTTP 400: flagged")
    assert [outcome.text for outcome in found if isinstance(outcome, Completion)] == [
        f"re: p{number}" for number in (0, 1, 2, 4, 5)
    ]


def test_prompt_that_is_no_unicode_text_is_its_own_failure(server: ModelServer) -> None:
    asked = _requests("good", "half \ud83d of a pair")
    good, bad = sorted(_ask(_spec(server), asked), key=lambda pair: pair[0].key)
    assert good[1].text == "re: good"
    assert isinstance(bad[1], Failure)
    assert "characters that cannot be sent" in bad[1].reason


def test_content_filter_in_the_middle_of_a_completion_is_a_failure() -> None:
    with ModelServer(lambda _: {"content": "I", "finish_reason": "content_filter"}) as server:
        found = _one(_spec(server))
        assert isinstance(found, Failure)
        assert "content filter" in found.reason
        assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("code", "error", "match"),
    [
        (401, None, r"HTTP 401: made-up fault 401.*TEST_KEY was refused"),
        (403, None, r"HTTP 403"),
        (404, None, r"model 'tiny' through api: chat \(HTTP 404"),
        (400, {"error": {"message": "no such model", "code": "model_not_found"}}, "no such model"),
        (429, {"error": {"message": "quota used up", "type": "insufficient_quota"}}, "quota used up.*Add credit"),
        (402, None, "Add credit"),
    ],
)
def test_fault_that_meets_every_request_ends_the_work(server: ModelServer, code: int, error: Any, match: str) -> None:
    """What others brought is given first."""
    server.gate.clear()
    broken = threading.Event()

    def faults(sent: dict[str, Any]) -> Any:
        if sent["messages"][0]["content"] != "p3":
            return None
        threading.Timer(0.2, server.gate.set).start()
        broken.set()
        return status(code, error)

    found = []
    with FaultyProxy(server.url, faults) as proxy:
        asked = _requests(*(f"p{number}" for number in range(20)))
        answers = _ask(_spec(proxy), asked)
        with pytest.raises(TeacherError, match=match):
            found.extend((request.prompt, outcome.text) for request, outcome in answers)
        assert broken.is_set()
        assert proxy.arrivals == 4
    assert sorted(found) == [("p0", "re: p0"), ("p1", "re: p1"), ("p2", "re: p2")]


def test_ten_failures_in_a_row_end_the_work_with_their_reason(server: ModelServer) -> None:
    with FaultyProxy(server.url, lambda _: status(400, {"detail": "unknown field 'top_k'"})) as proxy:
        found = []
        answers = _ask(_spec(proxy, concurrency=1), _requests(*"abcdefghijklmnop"))
        with pytest.raises(TeacherError, match=r"10 requests in a row.*HTTP 400: unknown field 'top_k'"):
            found.extend(outcome for _, outcome in answers)
        assert proxy.arrivals == 10
    assert found == [Failure("HTTP 400: unknown field 'top_k'")] * 10


def test_success_between_failures_lets_the_work_go_on(server: ModelServer) -> None:
    faults = [*[status(422)] * 9, None] * 3
    with FaultyProxy(server.url, faults) as proxy:
        found = _outcomes(_spec(proxy, concurrency=1), 30)
    assert [isinstance(outcome, Completion) for outcome in found] == ([False] * 9 + [True]) * 3


def test_prompts_that_are_refused_for_themselves_never_end_the_work(server: ModelServer) -> None:
    """What a finished run left over may be nothing but such prompts."""
    error = {"error": {"message": "This model's maximum context length is 10 tokens."}}
    with FaultyProxy(server.url, lambda _: status(400, error)) as proxy:
        found = _outcomes(_spec(proxy), 15)
    assert {outcome.reason for outcome in found} == {"HTTP 400: This model's maximum context length is 10 tokens."}


# The key


@pytest.mark.parametrize("code", [400, 500])
def test_key_is_never_repeated_in_a_failure(server: ModelServer, code: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with FaultyProxy(server.url, lambda _: echo_key(code)) as proxy:
        reason = _one(_spec(proxy, max_retries=1)).reason
        assert proxy.arrivals == (2 if code == 500 else 1)
    assert "bad header 'Authorization: Bearer [hidden]" in reason
    assert KEY not in reason
    assert caplog.records
    assert KEY not in "".join(f"{record.getMessage()} {record.__dict__}" for record in caplog.records)


def test_key_is_never_repeated_in_an_error_or_its_traceback(server: ModelServer) -> None:
    with FaultyProxy(server.url, lambda _: echo_key(401)) as proxy, pytest.raises(TeacherError) as caught:
        _one(_spec(proxy))
    shown = "".join(traceback.format_exception(caught.value))
    assert "bad header 'Authorization: Bearer [hidden]" in shown
    assert KEY not in shown


def test_key_is_not_repeated_in_an_answer_that_is_no_completion(server: ModelServer) -> None:
    with FaultyProxy(server.url, lambda _: body(f"<html>{KEY}, Bearer other".encode())) as proxy:
        reason = _one(_spec(proxy, max_retries=0)).reason
    assert "<html>[hidden], Bearer [hidden]" in reason


def test_key_that_stands_at_the_end_of_a_quotation_is_hidden_whole() -> None:
    text = quoted("x" * (asking.QUOTED_CHARACTERS - 5) + KEY, KEY)
    assert text.endswith("xxx[hidd"[-8:])
    assert KEY[:4] not in text


def test_check_of_a_wrong_key_names_the_variable_only() -> None:
    with ModelServer(key="right") as server, pytest.raises(ConfigError) as caught:
        _spec(server).check(chat=True, sampling=Sampling())
    assert "The key in the environment variable TEST_KEY was refused" in str(caught.value)
    assert KEY not in str(caught.value)
    with ModelServer(key="right") as server, pytest.raises(ConfigError, match="variable UNSET_KEY is not set"):
        _spec(server, api_key_env="UNSET_KEY").check(chat=True, sampling=Sampling())


def test_key_with_a_line_end_is_taken_without_it_and_one_with_a_space_refused(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_KEY", f"{KEY}\n")
    _one(_spec(server))
    assert server.seen[0].headers["authorization"] == f"Bearer {KEY}"
    monkeypatch.setenv("TEST_KEY", "sk secret")
    with pytest.raises(ConfigError, match="value of TEST_KEY holds characters") as caught:
        _one(_spec(server))
    assert "sk secret" not in str(caught.value)


def test_unset_key_is_no_hindrance_to_a_local_server(server: ModelServer) -> None:
    assert _one(_spec(server, api_key_env="UNSET_KEY")).text == "re: hello"


# The recipe


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"api_key_env": KEY}, "expected the NAME of an environment variable"),
        ({"api_key_env": "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ0123456789"}, "expected the NAME of an environment variable"),
        ({"api_key": KEY}, "'api_key' has no place in a recipe"),
        ({"base_url": f"https://me:{KEY}@host/v1"}, "a user name or password"),
        ({"base_url": f"https://host/v1?key={KEY}"}, "without `\\?`"),
    ],
)
def test_key_in_the_recipe_is_refused_without_repeating_it(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match) as caught:
        _spec(**fields)
    assert str(next(iter(fields.values()))) not in str(caught.value)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://host/v1", "http://", "http://host:80x/v1", "http://[::1/v1"]
)
def test_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="base_url"):
        _spec(base_url=url)


@pytest.mark.parametrize("name", ["model", "messages", "n", "stream", "top_p", "max_tokens", "seed", "top_logprobs"])
def test_extra_leaves_our_fields_alone(name: str) -> None:
    with pytest.raises(ValidationError, match=f"{name}.*are set by the toolkit"):
        _spec(extra={name: 1})


def test_identity_is_the_model_and_not_where_it_is_asked() -> None:
    def identity(**fields: Any) -> str:
        return _spec(**fields).open(task=TASK, sampling=Sampling(), seed=0).identity

    assert identity() == "tiny@ chat"
    assert identity(base_url="http://elsewhere/v1", concurrency=99, api_key_env="UNSET_KEY") == identity()
    others = [
        {"model": "big"},
        {"revision": "v2"},
        {"api": "completions"},
        {"extra": {"top_k": 1}},
        {"extra": {"a": 1}},
    ]
    assert len({identity(), *(identity(**fields) for fields in others)}) == 6


def test_manner_names_fields_and_leaves_out_what_decides_the_text() -> None:
    fields = set(OpenAICompatible.model_fields)
    assert fields >= OpenAICompatible.manner
    assert fields - OpenAICompatible.manner == {"kind", "model", "api", "revision", "extra", "licence"}


# Checks before anything is asked


def _check(spec: OpenAICompatible, *, chat: bool = True, **sampling: Any) -> None:
    spec.check(chat=chat, sampling=Sampling.model_validate(sampling))


def test_check_asks_for_the_list_of_models_alone(server: ModelServer) -> None:
    _check(_spec(server))
    assert server.seen == []


def test_check_says_which_model_comes_nearest() -> None:
    with ModelServer(models=["Qwen/Qwen3-8B", "meta/Llama-3"]) as server:
        with pytest.raises(ConfigError, match=r"no model 'qwen3-8b'\. Did you mean 'Qwen/Qwen3-8B'"):
            _check(_spec(server, model="qwen3-8b"))
        _check(_spec(server, model="/data/a folder"))


@pytest.mark.parametrize(
    "answer", [(404, b"no"), (500, b"oops"), (200, b"<html>"), (200, b"[1]"), (200, b'{"data": []}')]
)
def test_check_tolerates_a_server_without_a_list(answer: tuple[int, bytes]) -> None:
    asked = []
    with ModelServer() as server:
        server.get = lambda handler: (asked.append(handler.path), handler.reply(*answer))[1]  # type: ignore[method-assign]
        _check(_spec(server))
    assert set(asked) == {"/v1/models"}
    assert len(asked) <= 2


def test_check_of_a_server_that_is_not_there_names_the_address() -> None:
    with ModelServer() as gone:
        url = gone.url
    with pytest.raises(ConfigError, match=rf"cannot connect to {url} .*Start the server"):
        _check(_spec(base_url=url))


def test_check_refuses_a_chat_through_the_completions_api(server: ModelServer) -> None:
    with pytest.raises(ConfigError, match="completions API takes plain text"):
        _check(_spec(server, api="completions"))
    _check(_spec(server, api="completions"), chat=False)


def test_room_for_a_prompt_is_what_the_completion_leaves(server: ModelServer) -> None:
    assert _spec().max_prompt_tokens(Sampling()) is None
    assert _spec(context_tokens=1000).max_prompt_tokens(Sampling(max_new_tokens=300)) == 700
    with pytest.raises(ConfigError, match="leave no room for a prompt"):
        _check(_spec(server, context_tokens=300), max_new_tokens=300)


def test_missing_client_is_said_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'distill-llm\[openai\]'"):
        _check(_spec())


def test_tokens_are_counted_by_the_tokenizer_that_the_recipe_names(
    tiny_llama: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    tokenizer = tiny_llama().tokenizer
    tokenizer.save_pretrained(tmp_path / "plain")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "chat")
    prompts: list[Prompt] = ["who pays ?", (Message("system", "a"), Message("user", "ann and bob"))]
    assert _spec().count_tokens(prompts) is None
    assert _spec(tokenizer=str(tmp_path / "plain")).count_tokens(prompts) is None
    texts = ["user : who pays ? so", "system : a user : ann and bob so"]
    expected = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert _spec(tokenizer=str(tmp_path / "chat")).count_tokens(prompts) == expected
    marked = _spec(tokenizer=str(tmp_path / "chat"), extra={"chat_template_kwargs": {"mark": "so then because"}})
    assert marked.count_tokens(prompts) == [count + 2 for count in expected]
    plain = _spec(tokenizer=str(tmp_path / "plain"), api="completions")
    assert plain.count_tokens(["who pays ?", "a"]) == [
        len(tokenizer(text)["input_ids"]) for text in ("who pays ?", "a")
    ]


def test_teacher_is_described_without_asking() -> None:
    facts = _spec(revision="2025-01", licence="MIT").describe()
    assert (facts.name, facts.revision, facts.licence, facts.parameters) == ("tiny", "2025-01", "MIT", None)


def test_recipe_can_be_written_down_and_read_back() -> None:
    spec = _spec(extra={"chat_template_kwargs": {"enable_thinking": False}})
    assert OpenAICompatible.model_validate(json.loads(spec.model_dump_json())) == spec
    assert KEY not in spec.model_dump_json()
