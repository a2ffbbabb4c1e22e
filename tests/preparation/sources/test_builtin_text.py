"""Built-in corpora are real text and code of the running Python, the same every time."""

import ast
import io
import tokenize

import pytest

from rewurst import UsageError
from rewurst.preparation.sources.builtin_text import documents, without_comments


@pytest.fixture(scope="module")
def prose() -> list[str]:
    return list(documents("builtin:prose"))


@pytest.fixture(scope="module")
def code() -> list[str]:
    return list(documents("builtin:code"))


def test_prose_is_the_language_reference_and_docstrings(prose: list[str]) -> None:
    assert any("assert_stmt" in text or "Assertion" in text for text in prose[:80])
    assert any("Counter" in text and "multiset" in text for text in prose)
    assert len(prose) == len(set(prose))
    assert sum(map(len, prose)) > 1_500_000


def test_code_is_only_code(code: list[str]) -> None:
    assert len(code) == len(set(code))
    assert sum(map(len, code)) > 4_000_000
    for text in code[::20]:
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        assert all(token.type != tokenize.COMMENT for token in tokens)
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        assert all(ast.get_docstring(node) is None for node in ast.walk(ast.parse(text)) if isinstance(node, nodes))


def test_no_tests_and_no_packages_of_third_parties(code: list[str]) -> None:
    assert not any("class Test" in text and "unittest.main()" in text for text in code)


def test_comments_and_docstrings_are_taken_out_and_code_is_kept() -> None:
    source = (
        '"""Module."""\n# comment\nx = "# no comment"\n'
        'def f():\n    """Doc."""\nclass C:\n    "Doc."\n    y = 1  # why\n'
    )
    assert without_comments(source) == "x = '# no comment'\n\ndef f():\n    pass\n\nclass C:\n    y = 1\n"


def test_the_order_is_fixed() -> None:
    first, second = documents("builtin:code"), documents("builtin:code")
    assert [next(first) for _ in range(20)] == [next(second) for _ in range(20)]


def test_a_misspelled_name() -> None:
    with pytest.raises(
        UsageError, match=r"builtin:cod: no such .* builtin:prose or builtin:code; did you mean builtin:code\?"
    ):
        documents("builtin:cod")
