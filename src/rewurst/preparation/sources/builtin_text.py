"""Built-in corpora from the files of every Python: real prose and real code, in a fixed order, without a download.

``prose``: the language reference (``pydoc_data.topics``) and the docstrings of the standard library. ``code``: the
source of the standard library without comments and docstrings. The text depends on the version of Python.
"""

from __future__ import annotations

import ast
import inspect
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ... import UsageError
from ...hints import nearest

PREFIX = "builtin:"
# Tests, tools, third-party packages, generated tables; ``pydoc_data`` is the language reference itself.
_SKIPPED = {
    "test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "ensurepip",
    "pydoc_data", "__phello__", "__pycache__", "lib-dynload",
}  # fmt: skip
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class _Text(NamedTuple):
    line: int
    text: str


def documents(name: str) -> Iterator[str]:
    """Yield the documents of ``builtin:prose`` or ``builtin:code``, each once.

    Raises:
        UsageError: No built-in corpus has this name.
    """
    corpora = {f"{PREFIX}prose": _prose, f"{PREFIX}code": _code}
    if name not in corpora:
        near = nearest(name, list(corpora))
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"source {name}: no such built-in corpus, expected {' or '.join(corpora)}{hint}")
    return _unique(corpora[name]())


def _unique(texts: Iterator[str]) -> Iterator[str]:
    seen: set[str] = set()
    for text in texts:
        if text.strip() and text not in seen:
            seen.add(text)
            yield text


def _prose() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (topics[name].strip() + "\n" for name in sorted(topics))
    seen: set[str] = set()
    for source in _standard_library():
        docstrings = []
        for node in ast.walk(ast.parse(source)):
            docstring = _docstring(node)
            if docstring is not None and (text := inspect.cleandoc(docstring.text).strip()) not in seen:
                seen.add(text)  # overridden methods often repeat what they override
                docstrings.append((docstring.line, text))
        yield "".join(f"{text}\n\n" for _, text in sorted(docstrings))


def _code() -> Iterator[str]:
    return (without_comments(source) for source in _standard_library())


def without_comments(source: str) -> str:
    """Return Python source without comments and docstrings, in the layout of ``ast.unparse``."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and _docstring(node) is not None:
            node.body = node.body[1:] or ([] if isinstance(node, ast.Module) else [ast.Pass()])
    return ast.unparse(tree) + "\n"


def _docstring(node: ast.AST) -> _Text | None:
    """Return the docstring of a module, class or function as written in the source, and its line."""
    if isinstance(node, _DOCUMENTED) and node.body:
        match node.body[0]:
            case ast.Expr(value=ast.Constant(value=str(text), lineno=line)):
                return _Text(line, text)
    return None


def _standard_library() -> Iterator[str]:
    """Yield the sources of the standard library's modules, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    if not paths:
        raise UsageError(
            f"{root} has no .py files: this Python was installed without the source of its standard library"
        )
    for name in sorted(paths):
        if _SKIPPED.isdisjoint(name.split("/")):
            with tokenize.open(paths[name]) as file:  # honours the encoding that a source declares
                yield file.read()
