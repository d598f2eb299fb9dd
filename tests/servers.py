"""Local servers that tests put in place of a model's: an OpenAI-like one, and a proxy that breaks what passes through.

Any test can import them, for pytest's importlib mode knows this folder: ``from tests.servers import ModelServer``.

    with ModelServer(lambda body: "It is 4.") as server:                 # server.url ends in /v1
        faults = [status(429, headers={"Retry-After": "1"}), None, reset]     # by order of arrival; then all passes
        with FaultyProxy(server.url, faults) as proxy:
            ...                                                          # ask proxy.url
        assert len(server.seen) == 3                                     # what came: path, body, headers
        assert server.most_at_once <= 8

The proxy stands in front of any server, a real one too: it needs no more than its URL. Both end with their ``with``.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import struct
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Seen:
    """One POST that came in; ``headers`` have names in lower case."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        cast(_Listener, self.server).owner.get(self)

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        cast(_Listener, self.server).owner.post(self, content)

    def reply(self, code: int, content: bytes | dict[str, Any], headers: Mapping[str, str] | None = None) -> None:
        """Writes a whole answer; a dict as JSON."""
        body = json.dumps(content).encode() if isinstance(content, dict) else content
        self.send_response(code)
        usual = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        for name, value in {**usual, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    owner: _Server

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Server:
    """Listens on a free port of this machine from ``with`` to its end."""

    def __init__(self) -> None:
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self._listener = _Listener(("127.0.0.1", 0), _Handler)
        self._listener.owner = self
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.server_port}/v1"

    def __enter__(self) -> Any:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self._listener.shutdown()
        self._listener.server_close()
        self._thread.join(5)

    def get(self, handler: _Handler) -> None:
        raise NotImplementedError

    def post(self, handler: _Handler, content: bytes) -> None:
        raise NotImplementedError


def echo(body: Mapping[str, Any]) -> str:
    """The default answer: the last thing that was said, behind ``re:``."""
    return f"re: {body['messages'][-1]['content'] if 'messages' in body else body['prompt']}"


class ModelServer(_Server):
    """Answers both APIs with ``answer(body)``: a text, or the fields of the message (chat) or choice (completions).

    A word is a token. ``models``: what GET /models lists; None: a 404. ``key``: what it lets in; empty: everybody.
    ``logprobs``: False ignores that they were asked for, as some servers do. While ``gate`` is not set, requests wait.
    """

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], str | dict[str, Any]] = echo,
        *,
        models: Iterable[str] | None = ("tiny",),
        key: str = "",
        logprobs: bool = True,
    ):
        super().__init__()
        self.answer, self.key, self.logprobs = answer, key, logprobs
        self.models = None if models is None else list(models)
        self.seen: list[Seen] = []
        self.at_once = self.most_at_once = 0
        self.gate = threading.Event()
        self.gate.set()

    def __exit__(self, *error: object) -> None:
        self.gate.set()
        super().__exit__(*error)

    def get(self, handler: _Handler) -> None:
        if self._lets_in(handler):
            if handler.path != "/v1/models" or self.models is None:
                handler.reply(404, {"detail": "Not Found"})
            else:
                handler.reply(
                    200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]}
                )

    def post(self, handler: _Handler, content: bytes) -> None:
        if not self._lets_in(handler):
            return
        body = json.loads(content)
        with self.lock:
            self.seen.append(Seen(handler.path, body, {name.lower(): value for name, value in handler.headers.items()}))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            self.gate.wait()
            answer = self._completion(handler.path, body)
        finally:
            with self.lock:
                self.at_once -= 1
        handler.reply(200, answer)

    def _lets_in(self, handler: _Handler) -> bool:
        sent = handler.headers.get("Authorization", "")
        if self.key and sent != f"Bearer {self.key}":
            handler.reply(401, {"error": {"message": f"Incorrect key: {sent}", "code": "invalid_api_key"}})
            return False
        return True

    def _completion(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.answer(body)
        chat = path.endswith("/chat/completions")
        fields = {("content" if chat else "text"): answer} if isinstance(answer, str) else dict(answer)
        end = fields.pop("finish_reason", "stop")
        words = str(fields.get("content" if chat else "text") or "").split(" ")
        choice: dict[str, Any] = {"index": 0, "finish_reason": end}
        choice |= {"message": {"role": "assistant"} | fields} if chat else fields
        wanted = body.get("top_logprobs" if chat else "logprobs")
        if wanted and self.logprobs:
            choice["logprobs"] = chat_logprobs(words, wanted) if chat else plain_logprobs(words, wanted)
        usage = {"prompt_tokens": len(echo(body).split()) - 1, "completion_tokens": len(words)}
        return {"id": "1", "object": "completion", "model": body["model"], "choices": [choice], "usage": usage}


def likeliest(word: str, count: int) -> dict[str, float]:
    """Made-up log-probabilities at the place of ``word``: its own is -0.25."""
    return {word: -0.25} | {f"{word}~{rank}": -0.25 - rank for rank in range(1, count)}


def chat_logprobs(words: Iterable[str], count: int) -> dict[str, Any]:
    """As a chat completion has them."""
    places = []
    for word in words:
        tops = [{"token": token, "logprob": value, "bytes": None} for token, value in likeliest(word, count).items()]
        places.append(tops[0] | {"top_logprobs": tops})
    return {"content": places}


def plain_logprobs(words: Iterable[str], count: int) -> dict[str, Any]:
    """As a completion of plain text has them."""
    words = list(words)
    tops = [likeliest(word, count) for word in words]
    return {"tokens": words, "token_logprobs": [-0.25] * len(words), "top_logprobs": tops, "text_offset": []}


Fault = Callable[["FaultyProxy", _Handler, bytes], None]
"""Answers one request in a wrong way."""


def status(code: int, error: Any = None, headers: Mapping[str, str] | None = None) -> Fault:
    """An error with this body (or a usual one)."""
    body = {"error": {"message": f"made-up fault {code}", "code": None}} if error is None else error
    return lambda proxy, handler, content: handler.reply(code, body, headers)


def body(content: bytes | dict[str, Any]) -> Fault:
    """Status 200 with this content."""
    return lambda proxy, handler, _: handler.reply(200, content)


def truncated(proxy: FaultyProxy, handler: _Handler, content: bytes) -> None:
    """Half of the true answer, as if it were whole."""
    code, whole = proxy.forward(handler, content)
    handler.reply(code, whole[: len(whole) // 2])


def cut_off(proxy: FaultyProxy, handler: _Handler, content: bytes) -> None:
    """The connection ends in the middle of the true answer."""
    code, whole = proxy.forward(handler, content)
    handler.reply(code, whole[: len(whole) // 2], {"Content-Length": str(len(whole))})
    handler.close_connection = True


def reset(proxy: FaultyProxy, handler: _Handler, content: bytes) -> None:
    """The connection is torn down without an answer."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())  # close() would wait for the files that the handler has made of it
    handler.close_connection = True


def hang(proxy: FaultyProxy, handler: _Handler, content: bytes) -> None:
    """No answer until the proxy ends."""
    proxy.closing.wait()
    handler.close_connection = True


def drip(proxy: FaultyProxy, handler: _Handler, content: bytes) -> None:
    """An answer without end: a space every 50 ms, so that no wait for the next byte is long."""
    handler.close_connection = True
    handler.reply(200, b" ", {"Content-Length": "1000000"})
    with contextlib.suppress(OSError):  # the client went away
        while not proxy.closing.wait(0.05):
            handler.wfile.write(b" ")


def echo_key(code: int = 401) -> Fault:
    """An error that repeats the Authorization header, with and without its first word."""

    def fault(proxy: FaultyProxy, handler: _Handler, content: bytes) -> None:
        sent = handler.headers.get("Authorization", "")
        text = f"bad header 'Authorization: {sent}', key {sent.removeprefix('Bearer ')}"
        handler.reply(code, {"error": {"message": text, "code": None}})

    return fault


class FaultyProxy(_Server):
    """Passes requests on to the server at ``target`` (a URL that ends in /v1), but for those that meet a fault.

    ``faults``: by order of arrival of POSTs (None passes), or a function of a request's body. ``arrivals`` counts
    POSTs.
    """

    def __init__(self, target: str, faults: Iterable[Fault | None] | Callable[[dict[str, Any]], Fault | None]):
        super().__init__()
        self._target = urlsplit(target)
        self._choose = faults if callable(faults) else None
        self._schedule = iter(()) if callable(faults) else iter(faults)
        self.arrivals = 0

    def get(self, handler: _Handler) -> None:
        handler.reply(*self.forward(handler, b""))

    def post(self, handler: _Handler, content: bytes) -> None:
        with self.lock:
            self.arrivals += 1
            fault = self._choose(json.loads(content)) if self._choose else next(self._schedule, None)
        if fault is None:
            handler.reply(*self.forward(handler, content))
        else:
            fault(self, handler, content)

    def forward(self, handler: _Handler, content: bytes) -> tuple[int, bytes]:
        """Status and content of the true answer."""
        connection = http.client.HTTPConnection(str(self._target.hostname), self._target.port, timeout=120)
        kept = {
            name: value for name, value in handler.headers.items() if name.lower() in ("authorization", "content-type")
        }
        path = self._target.path + handler.path.removeprefix("/v1")
        connection.request(handler.command, path, content or None, kept)
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found


@contextlib.contextmanager
def program_server(
    command: Sequence[str | Path], *, health: str, log: Path, environment: Mapping[str, str], seconds: float = 120
) -> Iterator[str]:
    """Starts another program's server on a free port, waits until it is ready, and ends it with the block.

    ``{port}`` in the words of ``command`` is the port; ``health`` is a path that answers when it is ready. Gives the
    address without a path.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    words = [str(word).replace("{port}", str(port)) for word in command]
    with log.open("w") as output:
        server = subprocess.Popen(words, env=dict(environment), stdout=output, stderr=output)
        try:
            _wait_until_ready(address + health, server, log, seconds)
            yield address
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait_until_ready(address: str, server: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            break
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.3)
    raise AssertionError(f"the server ended by itself or was not ready in time:\n{log.read_text()[-2000:]}")
