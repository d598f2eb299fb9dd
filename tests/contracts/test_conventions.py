"""The rules of docs/conventions.md that no linter has: sizes, file names, heavy imports, docstrings, private names."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "distill_llm"

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_INIT_LINES = 30
NAMELESS_FILES = {"utils.py", "helpers.py", "misc.py"}
HEAVY = {
    "accelerate",
    "datasets",
    "evaluate",
    "pandas",
    "peft",
    "pyarrow",
    "tokenizers",
    "torch",
    "transformers",
}
# Light packages that a folder of plug-ins, which recipes load, must not wait for either.
HEAVY_IN = {f"{PACKAGE}/cache/": {"numpy"}}
# The others import these inside functions only, so they may be heavy.
HEAVY_FOLDERS = (
    f"{PACKAGE}/training/",
    f"{PACKAGE}/evaluation/metrics/",
    f"{PACKAGE}/core/word_sums.py",
    f"{PACKAGE}/models/cheap_dropout.py",
    f"{PACKAGE}/models/cpu_training.py",
    f"{PACKAGE}/models/dry_run.py",
    f"{PACKAGE}/models/gpu_attention.py",
    f"{PACKAGE}/models/head.py",
    f"{PACKAGE}/models/layers.py",
    f"{PACKAGE}/models/peers.py",
    f"{PACKAGE}/models/exits.py",
    f"{PACKAGE}/models/importance.py",
    f"{PACKAGE}/models/graphs.py",
    f"{PACKAGE}/models/prefix_attention.py",
    f"{PACKAGE}/pipeline/memory_model.py",
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Source(NamedTuple):
    """One file: its path from the root of the repository, its text, and its syntax tree."""

    path: str
    text: str
    tree: ast.Module

    @classmethod
    def parse(cls, path: str, text: str) -> Source:
        """The parsed file; a file that Python cannot read fails here, with its name."""
        return cls(path, text, ast.parse(text, filename=path))


def _code_lines(function: Function) -> int:
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def _runs_on_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported: not those of functions or under `if TYPE_CHECKING`."""
    for node in body:
        yield node
        if isinstance(node, Function):
            continue
        for field in ("body", "orelse", "handlers", "finalbody"):
            if field == "body" and _is_type_checking(node):
                continue
            yield from _runs_on_import(getattr(node, field, []))


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _is_ours(node: ast.Import | ast.ImportFrom) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.level > 0 or (node.module or "").split(".")[0] == PACKAGE
    return any(alias.name.split(".")[0] == PACKAGE for alias in node.names)


def long_files(source: Source) -> Iterator[tuple[int, str]]:
    """A file of more than 400 lines."""
    lines = len(source.text.splitlines())
    if lines > MAX_FILE_LINES:
        yield lines, f"the file has {lines} lines, over {MAX_FILE_LINES}: split it by what its parts give"


def long_functions(source: Source) -> Iterator[tuple[int, str]]:
    """A function of more than 60 lines, or an `__init__` of more than 30; docstrings do not count."""
    for node in ast.walk(source.tree):
        if isinstance(node, Function):
            limit = MAX_INIT_LINES if node.name == "__init__" else MAX_FUNCTION_LINES
            lines = _code_lines(node)
            if lines > limit:
                yield node.lineno, f"{node.name} has {lines} lines, over {limit}"


def nameless_files(source: Source) -> Iterator[tuple[int, str]]:
    """A file whose name says nothing about what it gives."""
    if Path(source.path).name in NAMELESS_FILES:
        yield 1, "name the module for what it gives"


def heavy_imports(source: Source) -> Iterator[tuple[int, str]]:
    """A heavy package imported when the module is: `--help` and recipe checks would wait for it."""
    if source.path.startswith(HEAVY_FOLDERS):
        return
    heavy = HEAVY.union(*(names for folder, names in HEAVY_IN.items() if source.path.startswith(folder)))
    for node in _runs_on_import(source.tree.body):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        for name in names:
            if name.split(".")[0] in heavy:
                yield node.lineno, f"import {name} inside the function that needs it, or under `if TYPE_CHECKING`"


def bare_excepts(source: Source) -> Iterator[tuple[int, str]]:
    """An `except:` that also catches Ctrl-C."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "name the exceptions that you can handle"


def missing_docstrings(source: Source) -> Iterator[tuple[int, str]]:
    """A module without a docstring; an empty `__init__.py` needs none."""
    if source.tree.body and ast.get_docstring(source.tree) is None:
        yield 1, "say in one sentence what the module gives"


def private_names_of_others(source: Source) -> Iterator[tuple[int, str]]:
    """A name with a leading underscore that was defined in another of our files."""
    imported: set[str] = set()
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Import | ast.ImportFrom) or not _is_ours(node):
            continue
        module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        for alias in node.names:
            imported.add(alias.asname or alias.name.split(".")[0])
            parts = [*module.split("."), *alias.name.split(".")]
            for part in filter(_is_private, parts):
                yield node.lineno, f"{part} is private to its file: make it public, or move what needs it"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            owner = node.value
            while isinstance(owner, ast.Attribute):
                owner = owner.value
            if isinstance(owner, ast.Name) and owner.id in imported:
                yield node.lineno, f"{ast.unparse(node)} is private to its file: make it public, or move what needs it"


RULES: dict[str, Callable[[Source], Iterator[tuple[int, str]]]] = {
    "file length": long_files,
    "function length": long_functions,
    "file name": nameless_files,
    "heavy import": heavy_imports,
    "bare except": bare_excepts,
    "module docstring": missing_docstrings,
    "private name": private_names_of_others,
}


def violations(rule: str, source: Source) -> list[str]:
    """What breaks `rule` in one file, as `file:line: [rule] what to do`."""
    return [f"{source.path}:{line}: [{rule}] {message}" for line, message in RULES[rule](source)]


@pytest.fixture(scope="module")
def package() -> list[Source]:
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    assert files, f"no Python file under {ROOT / PACKAGE}"
    return [Source.parse(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")) for file in files]


@pytest.mark.parametrize("rule", RULES)
def test_package_keeps_the_rule(rule: str, package: list[Source]) -> None:
    found = [message for source in package for message in violations(rule, source)]
    assert not found, "\n" + "\n".join(found)


def _function_of(lines: int, name: str = "train", docstring: str = "") -> str:
    return f"def {name}(self):\n{docstring}" + "    a = 1\n" * (lines - 1)


BREAKS = [
    ("file length", "a.py", "a = 1\n" * 401, 401),
    ("function length", "a.py", _function_of(61), 1),
    ("function length", "a.py", _function_of(31, "__init__"), 1),
    ("function length", "a.py", "class A:\n    async def b(self):\n" + "        a = 1\n" * 60, 2),
    ("file name", "core/utils.py", "", 1),
    ("heavy import", "a.py", "import json\nimport torch.nn as nn\n", 2),
    ("heavy import", "a.py", "try:\n    from peft import LoraConfig\nexcept ImportError:\n    pass\n", 2),
    ("heavy import", "a.py", "try:\n    import json\nexcept ImportError:\n    import torch\n", 4),
    ("heavy import", "a.py", "class A:\n    import pyarrow\n", 2),
    ("heavy import", "a.py", "if TYPE_CHECKING:\n    import json\nelse:\n    import torch\n", 4),
    ("heavy import", "training_notes/a.py", "import datasets\n", 1),
    ("heavy import", "cache/a.py", "import numpy as np\n", 1),
    ("bare except", "a.py", "try:\n    pass\nexcept:\n    pass\n", 3),
    ("module docstring", "a.py", "a = 1\n", 1),
    ("private name", "a.py", "from distill_llm.core.files import _rename\n", 1),
    ("private name", "a.py", "from .files import _rename\n", 1),
    ("private name", "a.py", "from distill_llm._core import rename\n", 1),
    ("private name", "a.py", "import distill_llm._core.files\n", 1),
    ("private name", "a.py", "from distill_llm.core import files\nfiles._rename()\n", 2),
    ("private name", "a.py", "import distill_llm.core.files\ndistill_llm.core.files._rename()\n", 2),
]

KEEPS = [
    ("file length", "a.py", "a = 1\n" * 400),
    ("function length", "a.py", _function_of(60)),
    ("function length", "a.py", _function_of(60, docstring='    """One.\n\n    Two.\n    """\n')),
    ("function length", "a.py", _function_of(30, "__init__")),
    ("file name", "core/files.py", ""),
    ("heavy import", "a.py", "def open_teacher():\n    import torch\n"),
    ("heavy import", "a.py", "if TYPE_CHECKING:\n    from torch import Tensor\n"),
    ("heavy import", "a.py", "from distill_llm.data import datasets\nfrom .torch import a\n"),
    ("heavy import", "training/a.py", "import torch\n"),
    ("heavy import", "evaluation/a.py", "import numpy as np\n"),
    ("heavy import", "cache/a.py", "def pack():\n    import numpy as np\n"),
    ("heavy import", "evaluation/metrics/a.py", "import evaluate\n"),
    ("bare except", "a.py", "try:\n    pass\nexcept OSError:\n    pass\n"),
    ("module docstring", "__init__.py", ""),
    ("module docstring", "a.py", '"""Files, written in one piece."""\n'),
    ("private name", "a.py", "from torch import _dynamo\nfrom distill_llm import __version__\nself._rename()\n"),
]


@pytest.mark.parametrize(("rule", "path", "text", "line"), BREAKS)
def test_rule_finds_what_breaks_it(rule: str, path: str, text: str, line: int) -> None:
    (message,) = violations(rule, Source.parse(f"{PACKAGE}/{path}", text))
    assert message.startswith(f"{PACKAGE}/{path}:{line}: [{rule}] ")


@pytest.mark.parametrize(("rule", "path", "text"), KEEPS)
def test_rule_accepts_what_keeps_it(rule: str, path: str, text: str) -> None:
    assert violations(rule, Source.parse(f"{PACKAGE}/{path}", text)) == []
