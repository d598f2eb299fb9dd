"""A small Hugging Face Hub on this machine: data sets and models, private or public, that can be made to fail.

It answers what ``huggingface_hub`` and ``datasets`` ask when they create, fill, read and download a repository, with
large files by Git LFS (not Xet). Objects lie on disk, so that an upload that broke off is taken up where it stopped.

``huggingface_hub`` reads HF_ENDPOINT, HF_HUB_OFFLINE and HF_HUB_DISABLE_XET when it is imported, and the tests import
it offline. So whatever is to talk to this server runs in a process of its own, with ``server.environment()``::

    with HubServer(tmp_path / "hub") as server:
        subprocess.run([...], env=server.environment())
        assert server.repositories["dataset", "ann/rows"].private

Tests load this file by its path, because no package holds it (see tests/unit/hub/test_upload.py).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_WritesAndReads0123456789"
READ_TOKEN = "hf_OnlyReads0123456789"
USER = "ann"
ORGANISATION = "lab"

LARGE = (".parquet", ".safetensors", ".bin", ".model")
"""Endings of files that go to LFS, as a new repository's .gitattributes has it."""

_DATE = "2024-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class StoredFile:
    """One file of a commit. ``lfs`` is the SHA-256 of a large file, None for one that Git keeps itself."""

    content: Path
    blob: str
    num_bytes: int
    lfs: str | None

    def entry(self, path: str) -> dict[str, Any]:
        """What the tree and path endpoints say of it."""
        said: dict[str, Any] = {"type": "file", "path": path, "size": self.num_bytes, "oid": self.blob}
        if self.lfs:
            said["lfs"] = {"oid": self.lfs, "size": self.num_bytes, "pointerSize": 130}
        return said


@dataclass(frozen=True)
class Commit:
    """One commit, with all files that it leaves in place."""

    oid: str
    message: str
    files: dict[str, StoredFile]


@dataclass
class Repository:
    """A repository with its one branch, ``main``."""

    repo_type: str
    repo_id: str
    private: bool
    commits: list[Commit] = field(default_factory=list)

    def commit(self, message: str, changed: dict[str, StoredFile | None]) -> Commit:
        """Adds a commit; None deletes a file."""
        files = (self.commits[-1].files if self.commits else {}) | changed
        kept = {path: file for path, file in files.items() if file is not None}
        oid = hashlib.sha1(f"{self.repo_id} {len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append(Commit(oid, message, kept))
        return self.commits[-1]

    def contents(self) -> dict[str, bytes]:
        """The newest commit's files."""
        return {path: file.content.read_bytes() for path, file in self.commits[-1].files.items()}


class HubServer:
    """Serves from ``with`` to its end. ``requests`` lists (method, path) of all that was asked, faults included."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[tuple[str, str, Iterator[int | None]]] = []
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> HubServer:
        (self.folder / "objects").mkdir(parents=True, exist_ok=True)
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def environment(self, token: str | None = TOKEN, **changes: str) -> dict[str, str]:
        """The variables of a process that takes this server for the Hub, with a cache and a home of its own."""
        dropped = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE")
        kept = {name: value for name, value in os.environ.items() if name not in dropped}
        wanted = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.folder / "home"), "HF_HUB_DISABLE_XET": "1"}
        wanted |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        return kept | wanted | ({"HF_TOKEN": token} if token is not None else {}) | changes

    def create(self, repo_type: str, repo_id: str, *, private: bool) -> Repository:
        """Makes a repository, with the first commit that the Hub makes by itself."""
        made = self.repositories[repo_type, repo_id] = Repository(repo_type, repo_id, private)
        rules = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LARGE)
        made.commit("initial commit", {".gitattributes": self.store(rules.encode(), large=False)})
        return made

    def store(self, content: bytes, *, large: bool) -> StoredFile:
        """Writes an object, unless it is there."""
        sha256 = hashlib.sha256(content).hexdigest()
        if not self.object(sha256).exists():
            self.object(sha256).write_bytes(content)
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return StoredFile(self.object(sha256), blob, len(content), sha256 if large else None)

    def object(self, sha256: str) -> Path:
        """Where an object lies, or would."""
        return self.folder / "objects" / sha256

    def asked(self, method: str, path: str = "") -> int:
        """How often ``method`` was asked of an address in which the expression ``path`` is found."""
        return sum(method == found and re.search(path, where) is not None for found, where in self.requests)

    def fail(self, method: str, path: str, status: int = 507, *, after: int = 0, times: int = 1000) -> None:
        """After ``after`` requests that match, the next ``times`` get ``status``; 0 drops the connection.

        The client tries 500 and 503 again for half a minute, 507 never. ``faults.clear()`` ends all.
        """
        self.faults.append((method, path, iter([None] * after + [status] * times)))

    def fault(self, method: str, path: str) -> int | None:
        """The status with which a request is to fail, if it is."""
        hits = [next(left, None) for name, where, left in self.faults if name == method and re.search(where, path)]
        return next((status for status in hits if status is not None), None)


@dataclass(frozen=True)
class Answer:
    """What goes back: JSON, or the bytes of a file."""

    status: int
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str = ""):
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer(status, {"error": message}, headers)


class _Handler(BaseHTTPRequestHandler):
    """One connection. A route is (method, expression of the path, method name); its groups are the arguments."""

    hub: HubServer
    body: bytes
    protocol_version = "HTTP/1.1"
    routes: tuple[tuple[str, str, str], ...] = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/([^/]+)", "paths"),
        ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", "tree"),
        ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("POST", r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("POST", r"/lfs/verify", "verify"),
        ("PUT", r"/lfs/([0-9a-f]{64})", "put"),
        ("GET", r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # a client that was killed
            self.close_connection = True

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            fault = self.hub.fault(self.command, path)
        if fault is None:
            self._send(self._answer(path))
        elif fault:
            self._send(Answer(fault, {"error": "made to fail"}))
        else:
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self, path: str) -> Answer:
        for method, expression, name in self.routes:
            found = re.fullmatch(expression, path)
            if found and method == self.command.replace("HEAD", "GET"):
                act: Callable[..., Answer] = getattr(self, name)
                try:
                    with self.hub.lock:
                        return act(*found.groups())
                except _Refused as refused:
                    return refused.answer
        return Answer(404, {"error": f"this Hub knows no {self.command} {path}"})

    def _send(self, answer: Answer) -> None:
        raw = isinstance(answer.body, bytes)
        content = answer.body if raw else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        self.send_header("Content-Type", "application/octet-stream" if raw else "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _user(self, *, writes: bool = False) -> str | None:
        """Who asks; None for nobody. Refuses a wrong token, and one that may not write where it must."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given not in ("", TOKEN, READ_TOKEN):
            raise _Refused(401, "Invalid credentials in Authorization header")
        if writes and given != TOKEN:
            raise _Refused(403 if given else 401, "You don't have the required permissions")
        return USER if given else None

    def _found(self, kind: str, repo_id: str, *, writes: bool = False) -> Repository:
        """The repository, where who asks may see it: to others, a private one is as good as missing."""
        user = self._user(writes=writes)
        found = self.hub.repositories.get((kind.rstrip("s"), repo_id))
        hidden = found is not None and found.private and (user is None or not _ours(repo_id))
        if found is None or hidden:
            raise _Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if writes and not _ours(repo_id):
            raise _Refused(403, f"You may not write to {repo_id}")
        return found

    def _commit(self, repository: Repository, revision: str | None) -> Commit:
        for commit in reversed(repository.commits):
            if revision in (None, "main", commit.oid):
                return commit
        raise _Refused(404, "Invalid rev id", "RevisionNotFound")

    def whoami(self) -> Answer:
        if self._user() is None:
            raise _Refused(401, "Invalid username or password.")
        return Answer(200, {"type": "user", "name": USER, "orgs": [{"name": ORGANISATION}]})

    def create(self) -> Answer:
        self._user(writes=True)
        wanted = json.loads(self.body)
        owner, repo_type = wanted.get("organization") or USER, wanted.get("type") or "model"
        if not _ours(owner):
            raise _Refused(403, f'You don\'t have the rights to create a {repo_type} under the namespace "{owner}"')
        repo_id = f"{owner}/{wanted['name']}"
        url = f"{self.hub.endpoint}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
        if (repo_type, repo_id) in self.hub.repositories:
            return Answer(409, {"error": "You already created this repo", "url": url})
        private = wanted.get("private", wanted.get("visibility") == "private")  # the older and the newer client
        self.hub.create(repo_type, repo_id, private=private)
        return Answer(200, {"url": url, "name": repo_id})

    def validate_yaml(self) -> Answer:
        head = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        try:
            dict(yaml.safe_load(head[1]) if head else {})
        except (yaml.YAMLError, TypeError, ValueError) as error:
            return Answer(400, {"errors": [{"message": f"not a mapping in YAML: {error}"}], "warnings": []})
        return Answer(200, {"errors": [], "warnings": [] if head else [{"message": "empty or missing yaml metadata"}]})

    def preupload(self, kind: str, repo_id: str, revision: str) -> Answer:
        there = self._commit(self._found(kind, repo_id, writes=True), revision).files
        said = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) or file["size"] > 10_000_000 else "regular"
            old = there.get(file["path"])
            one = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            said.append(one | ({"oid": old.lfs or old.blob} if old else {}))
        return Answer(200, {"files": said})

    def batch(self, prefix: str | None, repo_id: str) -> Answer:
        self._found("dataset" if prefix else "model", repo_id, writes=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            one = {"oid": wanted["oid"], "size": wanted["size"]}
            if not self.hub.object(wanted["oid"]).exists():
                here = {"upload": f"lfs/{wanted['oid']}", "verify": "lfs/verify"}
                one["actions"] = {name: {"href": f"{self.hub.endpoint}/{path}"} for name, path in here.items()}
            objects.append(one)
        return Answer(200, {"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> Answer:  # like the real store, it knows its callers by the address alone
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, "the content is not what its hash says")
        self.hub.store(self.body, large=True)
        return Answer(200, {})

    def verify(self) -> Answer:
        self._user(writes=True)
        if not self.hub.object(json.loads(self.body)["oid"]).exists():
            raise _Refused(404, "no such object")
        return Answer(200, {})

    def commit(self, kind: str, repo_id: str, revision: str) -> Answer:
        repository = self._found(kind, repo_id, writes=True)
        message, changed = "", {}
        for line in self.body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                changed[value["path"]] = self.hub.store(base64.b64decode(value["content"]), large=False)
            elif key == "lfsFile":
                if not self.hub.object(value["oid"]).exists():
                    raise _Refused(400, f"LFS object {value['oid']} was never uploaded")
                changed[value["path"]] = self.hub.store(self.hub.object(value["oid"]).read_bytes(), large=True)
            elif key == "deletedFile":
                changed[value["path"]] = None
        oid = repository.commit(message, changed).oid
        url = f"{self.hub.endpoint}/{'datasets/' if kind == 'datasets' else ''}{repo_id}/commit/{oid}"
        return Answer(200, {"success": True, "commitOid": oid, "commitUrl": url})

    def info(self, kind: str, repo_id: str, revision: str | None) -> Answer:
        repository = self._found(kind, repo_id)
        commit = self._commit(repository, revision)
        said = {"_id": repo_id, "id": repo_id, "author": repo_id.partition("/")[0], "sha": commit.oid}
        files = [{"rfilename": path} for path in commit.files]
        said |= {"private": repository.private, "gated": False, "disabled": False, "tags": [], "siblings": files}
        return Answer(200, said | {"createdAt": _DATE, "lastModified": _DATE, "downloads": 0, "likes": 0})

    def tree(self, kind: str, repo_id: str, revision: str, below: str | None) -> Answer:
        commit = self._commit(self._found(kind, repo_id), revision)
        start = f"{below}/" if below else ""
        within = {path: file for path, file in commit.files.items() if path.startswith(start)}
        if below and not within:
            raise _Refused(404, f"{below} does not exist", "EntryNotFound")
        deep = "recursive=true" in urlsplit(self.path).query.lower()
        folders = {str(parent) for path in within for parent in Path(path).parents if str(parent) not in (".", below)}
        entries = [_folder(folder) for folder in sorted(folders) if folder.startswith(start)]
        entries += [file.entry(path) for path, file in sorted(within.items())]
        return Answer(200, [one for one in entries if deep or "/" not in one["path"].removeprefix(start)])

    def paths(self, kind: str, repo_id: str, revision: str) -> Answer:
        commit = self._commit(self._found(kind, repo_id), revision)
        said = []
        for path in json.loads(self.body)["paths"]:
            if path in commit.files:
                said.append(commit.files[path].entry(path))
            elif any(other.startswith(f"{path}/") for other in commit.files):
                said.append(_folder(path))
        return Answer(200, said)

    def resolve(self, prefix: str | None, repo_id: str, revision: str, path: str) -> Answer:
        commit = self._commit(self._found("dataset" if prefix else "model", repo_id), revision)
        file = commit.files.get(path)
        if file is None:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        headers = {"ETag": f'"{file.lfs or file.blob}"', "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        content = file.content.read_bytes()
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is None:
            return Answer(200, content, headers)
        start, end = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return Answer(206, content[start : end + 1], headers)


def _ours(repo_id: str) -> bool:
    return repo_id.partition("/")[0] in (USER, ORGANISATION)


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
