"""Write ``report.md`` and ``report.json`` of a study."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..files import write_atomically
from .jobs import Name, Result
from .verdicts import Row

VERDICTS = """\
A claim is **held** if the 90 % interval of its mean over the seeds (Student's t) is within the bound, **not held** if
it is outside, and **undecided** if it contains the bound or there is only one seed."""


def write(out: Path, content: Row, lines: Iterable[str]) -> None:
    """Write both files of a report.

    Args:
        out: Folder of the study.
        content: Content of ``report.json``.
        lines: Lines of ``report.md``.
    """
    write_atomically(out / "report.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_atomically(out / "report.md", "\n".join(lines) + "\n")


def hours(results: Mapping[Name, Result]) -> float:
    """Return the wall-clock hours of all processes."""
    return round(sum(result.seconds for result in results.values()) / 3600, 2)


def machine() -> str:
    """Return the number of cores and the version of Python as text."""
    return f"{os.cpu_count()} cores, Python {platform.python_version()}"


def claims_table(claims: Iterable[Row]) -> list[str]:
    """Return the lines of the table of claims."""
    lines = [
        "| claim | measured as | papers | held if | ours | spread | seeds | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for claim in claims:
        ours, spread = ("" if value is None else f"{value:.3f}" for value in (claim["ours"], claim["spread"]))
        lines.append(
            f"| {claim['claim']} | {claim['quantity']} | {claim['paper']} | {claim['bound']} | "
            f"{ours} | {spread} | {claim['seeds']} | **{claim['verdict']}** |"
        )
    return lines
