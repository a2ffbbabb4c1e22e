"""Find phrases that read as if translated: ``python docs/check_english.py``, a part of ``make lint``.

The check reads the rooms in ``CLEAN``.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CLEAN = (
    "README.md",
    "CONTRIBUTING.md",
    "Makefile",
    "setup.py",
    "train.py",
    "benchmarks",
    "callbacks",
    "configs",
    "datamodules",
    "docs",
    "examples",
    "modules",
    "src/rewurst",
    "tests",
)
SKIPPED = (
    "tests/test_english.py",  # examples of what the check finds
    "docs/reports",  # written by `rewurst reproduce`, whose texts are in src/rewurst/reproduce
)
SUFFIXES = (".md", ".py", ".yaml", ".sh", ".sbatch")

AMOUNT = (
    r"(?:\d(?:[\d.,]*\d)?[kKMGT]?|once|twice|loss|losses|tokens|bytes|nats|samples|images|pictures|pixels|steps|rows|seconds|"
    r"hours|files|numbers|gradients|parameters|runs|lines|cores|jobs|[KMGT]B|[GT]?FLOPs?(?:/s)?|d T)"
)
UNIT = (
    r"(?:token|sample|step|second|parameter|row|device|image|picture|pixel|epoch|batch|node|process|seed|member|"
    r"corpus|latent|stage|layer|block|prompt|core|rank|shard|element|file|run|line|CPU-second)"
)
PHRASES = {  # a pattern and what to write instead
    rf"\b{AMOUNT}\s+an?\s+{UNIT}\b": "per",
    r"(?<!here\s)\b(?:is|are|was|were|be)\s+no\b(?!\s+(?:longer|more|less)\b)": "is not a",
    r"\b(?:go|goes|going|went|gone)\s+on\b(?!\s+top)": "continue, or resume",
    r"\b(?:begin|begins|begun|beginning|start|starts)\s+anew\b": "start from the beginning",
    r"\bbeside\b": "next to, or besides",
    r"\b(?:lies|lie|lay)\s+(?:in|there|under|below|apart)\b": "is in, or is stored in",
    r"\bwould\s+do\s+no\b": "has no ... left",
    r"\bto\s+be\s+had\b": "available",
}
RIDDLE = re.compile(r"(?:Of|What|Whose|Who|Whom|Which|That|Nothing)\b")

# At most 20 texts that a pattern finds and that are right, each with the reason.
ALLOWED: dict[str, str] = {}


def findings(name: str, text: str) -> Iterator[tuple[int, str, str]]:
    """Yield the line, the text found and the advice for every bad phrase and docstring of a file.

    Args:
        name: File name; docstrings are read from ``.py`` files.
        text: Content of the file.
    """
    prose = re.sub(r"^[ \t]*#", lambda mark: " " * len(mark.group()), text, flags=re.MULTILINE)  # comments wrap, too
    for pattern, better in PHRASES.items():
        for match in re.finditer(pattern, prose, re.IGNORECASE):
            context = " ".join(prose[max(0, match.start() - 80) : match.end() + 80].split())
            phrase = " ".join(match.group().split())
            if not any(phrase in allowed and allowed in context for allowed in ALLOWED):
                yield prose.count("\n", 0, match.start()) + 1, phrase, f"write {better!r}"
    if not name.endswith(".py"):
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node) or ""
            if RIDDLE.match(docstring):
                yield getattr(node, "lineno", 1), docstring.split("\n")[0], "say what it is or does"


def files(room: str) -> list[Path]:
    """Return the files of a room that the check reads."""
    if (ROOT / room).is_file():
        return [ROOT / room]
    paths = (path for path in sorted((ROOT / room).rglob("*")) if path.suffix in SUFFIXES)
    return [path for path in paths if not path.relative_to(ROOT).as_posix().startswith(SKIPPED)]


def main() -> int:
    """Print every finding and return the exit status, 1 if there are any."""
    found = 0
    for path in (path for room in CLEAN for path in files(room)):
        for number, phrase, advice in findings(path.name, path.read_text(encoding="utf8")):
            print(f"{path.relative_to(ROOT)}:{number}: {phrase!r}: {advice}")
            found += 1
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
