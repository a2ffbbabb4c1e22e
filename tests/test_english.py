"""The check of the prose finds what it is for, leaves good English alone, and is called by ``make lint``."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def check_english(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import check_english

    return check_english


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It is no Lightning checkpoint.", "is no"),
        ("about 932 tokens a second", "tokens a second"),
        ("The loss is 4.5 nats a token.", "nats a token"),
        ("2.03 bytes a parameter", "bytes a parameter"),
        ("read once an epoch", "once an epoch"),
        ("Goes on.", "Goes on"),
        ("# the same command goes on", "goes on"),
        ("going on from step 3", "going on"),
        ("--overwrite begins anew", "begins anew"),
        ("an index beside the shards", "beside"),
        ("the file lies in a folder", "lies in"),
        ("    # The same command goes\n    # on.", "goes on"),
    ],
)
def test_finds_a_bad_phrase(check_english: ModuleType, text: str, found: str) -> None:
    assert [(line, phrase) for line, phrase, _ in check_english.findings("page.md", f"Good.\n{text}")] == [(2, found)]


@pytest.mark.parametrize("start", ["Of an image.", "What all units need.", "Whose copy is kept.", "Who does it."])
def test_finds_a_docstring_that_is_a_riddle(check_english: ModuleType, start: str) -> None:
    source = f'def f():\n    """{start}"""\n'
    assert [(line, phrase) for line, phrase, _ in check_english.findings("module.py", source)] == [(1, start)]
    assert not list(check_english.findings("module.py", source.replace(start, "Return the loss.")))


@pytest.mark.parametrize(
    "text",
    [
        "932 tokens per second",
        "1. A corpus has rows.",
        "There is no run to resume.",
        "the token that ends a document, and a second file",
        "It is no longer needed.",
        "Besides, each step takes a sample.",
        "Activations go on top.",
    ],
)
def test_leaves_good_english_alone(check_english: ModuleType, text: str) -> None:
    assert not list(check_english.findings("page.md", text))


def test_leaves_an_allowed_text_alone(check_english: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_english, "ALLOWED", {"what is going on": "an idiom"})
    assert not list(check_english.findings("page.md", "Nobody knows what is going\non here."))
    assert list(check_english.findings("page.md", "The run is going on."))


def test_fails_on_a_bad_line_and_passes_here(
    check_english: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_english.main() == 0, capsys.readouterr().out
    (tmp_path / "page.md").write_text("The run goes on.\n")
    monkeypatch.setattr(check_english, "ROOT", tmp_path)
    monkeypatch.setattr(check_english, "CLEAN", ("page.md",))
    assert check_english.main() == 1
    assert "page.md:1: 'goes on'" in capsys.readouterr().out


def test_every_room_of_the_list_has_files(check_english: ModuleType) -> None:
    assert all(check_english.files(room) for room in check_english.CLEAN)
    assert len(check_english.ALLOWED) <= 20


def test_lint_calls_it() -> None:
    lint = (ROOT / "Makefile").read_text(encoding="utf8").split("\nlint:")[1].split("\n\n")[0]
    assert "docs/check_english.py" in lint
