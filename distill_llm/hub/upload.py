"""Files on the Hugging Face Hub: listed before they are sent, sent in one commit, private unless said otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

from distill_llm.core.errors import ConfigError, DataError, DistillError, StorageError
from distill_llm.core.hub import PROBE_SECONDS, why_unreachable

if TYPE_CHECKING:
    from huggingface_hub import DatasetInfo, HfApi, ModelInfo

RepoType: TypeAlias = Literal["dataset", "model"]

_KIND: Mapping[RepoType, str] = {"dataset": "data set", "model": "model"}
_FORBIDDEN_PARTS = {"..", ".git", ".cache"}  # the Hub takes no file below these
_LOG_IN = (
    "Type `hf auth login`, or set HF_TOKEN, with a token that has write access; it is made at "
    "https://huggingface.co/settings/tokens"
)


@dataclass(frozen=True, slots=True)
class Upload:
    """One file to be sent: its path in the repository, where it lies here, and its size."""

    path_in_repo: str
    file: Path
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Pushed:
    """``url`` is that of the newest commit. Not ``changed``: the Hub had every file already, no commit was made."""

    url: str
    changed: bool
    private: bool


@dataclass(frozen=True, slots=True)
class _Target:
    """The repository that is written to."""

    repo_id: str
    repo_type: RepoType

    def __str__(self) -> str:
        return f"push to the {_KIND[self.repo_type]} '{self.repo_id}'"


def plan_upload(folder: Path, files: Sequence[Path]) -> tuple[Upload, ...]:
    """What ``push`` would send of ``folder``, in the order of ``files``; a file lies where it does in the folder.

    Paths count from the folder. Asks nothing of the Hub. Raises ConfigError for a file outside the folder, DataError
    for one that is not there.
    """
    root = folder.absolute()
    planned = []
    for file in dict.fromkeys(root / file for file in files):
        if not file.is_relative_to(root):
            raise ConfigError(f"{file}: it lies outside {root}, the folder that is sent. Name files of the folder.")
        planned.append(_upload(file.relative_to(root).as_posix(), file))
    return tuple(planned)


def plan_uploads(files: Mapping[str, Path]) -> tuple[Upload, ...]:
    """What ``push`` would send of ``files`` (path in the repository: local file). Raises as ``plan_upload`` does."""
    return tuple(_upload(path, file) for path, file in files.items())


def push(
    files: Mapping[str, Path],
    *,
    repo_id: str,
    repo_type: RepoType,
    private: bool = True,
    message: str,
    token: str | None = None,
) -> Pushed:
    """Sends ``files`` (path in the repository: local file) in one commit, and makes the repository where it is missing.

    ``private`` decides for a new repository. An existing one keeps its visibility, and a public one is refused unless
    ``private`` is False. Files that the commit does not name stay as they are. After an interruption the same call
    goes on: what the Hub already stores, it does not ask for again. ``token`` is the one of `hf auth login` or HF_TOKEN
    if not given, and never part of a message. Raises ConfigError or DataError where the call is wrong, StorageError
    where the Hub cannot be reached or the upload breaks off.
    """
    target = _Target(_checked(repo_id), repo_type)
    uploads = plan_uploads(files)
    if not uploads:
        raise ConfigError(f"{target}: no file was named. Expected at least one.")

    from huggingface_hub import CommitOperationAdd, HfApi

    secret = _token(target, token)
    api = HfApi(token=secret, library_name="distill-llm")
    with _clear_errors(target, secret):
        repository = _repository(api, target, private)
        commit = api.create_commit(
            repo_id,
            operations=[CommitOperationAdd(upload.path_in_repo, upload.file) for upload in uploads],
            commit_message=message,
            repo_type=repo_type,
        )
    return Pushed(commit.commit_url, changed=commit.oid != repository.sha, private=bool(repository.private))


def _upload(path_in_repo: str, file: Path) -> Upload:
    path = PurePosixPath(path_in_repo)
    if not path.parts or path.is_absolute() or _FORBIDDEN_PARTS.intersection(path.parts):
        raise ConfigError(
            f"'{path_in_repo}': not a path in a repository of the Hub. Expected one that counts from its root, without "
            f"any of {sorted(_FORBIDDEN_PARTS)}."
        )
    if not file.is_file():
        raise DataError(f"{file}: no such file, so that it cannot be sent as '{path_in_repo}'. Make it first.")
    return Upload(str(path), file, file.stat().st_size)


def _checked(repo_id: str) -> str:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        reason = "" if "/" in repo_id else "The owner is missing. "
    except HFValidationError as error:
        reason = f"{error} "
    if reason:
        raise ConfigError(
            f"'{repo_id}': not the name of a repository on the Hub. {reason}Expected 'owner/name', the owner being "
            "your user name or an organisation of yours."
        )
    return repo_id


def _token(target: _Target, given: str | None) -> str:
    from huggingface_hub import get_token

    token = given if given is not None else get_token()
    if not token:
        raise ConfigError(f"{target}: you are not logged in to the Hub. {_LOG_IN}.")
    if not token.isascii() or not token.isprintable() or " " in token:  # else it would be quoted in an HTTP error
        raise ConfigError(f"{target}: the token holds spaces or other signs that no token has. {_LOG_IN}.")
    return token


def _repository(api: HfApi, target: _Target, private: bool) -> DatasetInfo | ModelInfo:
    """The repository, made where it is missing. Raises ConfigError where it is public and was to be private."""
    found = _find(api, target)
    if found is None:
        api.create_repo(target.repo_id, repo_type=target.repo_type, private=private, exist_ok=True)
        found = _info(api, target)
    if private and not found.private:
        raise ConfigError(
            f"{target}: it is public, and a private one was asked for, so nothing was sent. Choose another name, make "
            "it private in its settings on the Hub, or push with `--public` (in Python: private=False) if everyone "
            "may read what you send."
        )
    return found


def _find(api: HfApi, target: _Target) -> DatasetInfo | ModelInfo | None:
    """The repository, None where there is none. Raises StorageError, and soon, where the Hub does not answer."""
    from huggingface_hub.errors import RepositoryNotFoundError

    found: list[DatasetInfo | ModelInfo] = []
    try:
        why = why_unreachable(lambda: found.append(_info(api, target)))
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:  # the library's word for a missing repository, and for a wrong token
            raise
        return None
    if why is not None:
        raise StorageError(
            f"{target}: the Hub ({api.endpoint}) cannot be reached ({why}). Check the network, HF_ENDPOINT and "
            "HF_HUB_OFFLINE, then type the same command again."
        )
    return found[0]


def _info(api: HfApi, target: _Target) -> DatasetInfo | ModelInfo:
    ask = api.dataset_info if target.repo_type == "dataset" else api.model_info
    return ask(target.repo_id, timeout=PROBE_SECONDS)


@contextmanager
def _clear_errors(target: _Target, secret: str) -> Iterator[None]:
    """Turns what the Hub's client raises into one error that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError

    of_the_network = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)  # HTTPError and OSError
    try:
        yield
    except DistillError:
        raise
    except (RuntimeError, ValueError, *of_the_network) as error:
        raise _explained(error, target, secret) from error


def _explained(error: Exception, target: _Target, secret: str) -> DistillError:
    root: BaseException = error
    while isinstance(root, RuntimeError) and root.__cause__ is not None:  # "Error while uploading 'x' to the Hub."
        root = root.__cause__
    response = getattr(root, "response", None)
    status = response.status_code if response is not None else None
    said = " ".join((getattr(root, "server_message", None) or ("" if status else str(root))).split())
    reason = f"{status or type(root).__name__}{f': {said}' if said else ''}".replace(secret, "***")
    if status == 401:
        return ConfigError(f"{target}: the Hub does not accept the token (401). {_LOG_IN}.")
    if status in (403, 404):
        return ConfigError(
            f"{target}: the token may not write there ({reason}). Push to a name of your own or of an organisation "
            f"that lets you write. {_LOG_IN}."
        )
    if str(error).startswith("Invalid metadata in README.md"):
        return DataError(f"{target}: the Hub refuses the head of README.md: {error}. Correct it and push again.")
    return StorageError(
        f"{target}: the upload broke off ({reason}). Type the same command again: what the Hub already has is not "
        "sent again."
    )
