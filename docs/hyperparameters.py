"""Write the tables of docs/from_the_papers.md from hyperparameters.yaml: ``python docs/hyperparameters.py``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
PAGE = HERE / "from_the_papers.md"
MARKS = "<!-- {field}: made from hyperparameters.yaml -->\n", "<!-- end of {field} -->\n"


def entries() -> dict[str, list[dict[str, Any]]]:
    """Return the entries by field."""
    content: dict[str, list[dict[str, Any]]] = yaml.safe_load((HERE / "hyperparameters.yaml").read_text("utf8"))
    return content


def table(rows: list[dict[str, Any]]) -> str:
    """Return the Markdown table of a field."""
    lines = ["| hyper-parameter | paper | authors' code | ours | why ours differs, or what we follow |"]
    lines.append("|---|---|---|---|---|")
    for row in rows:
        values = ", ".join(f"`{key.split('.')[-1]}: {_shown(value)}`" for key, value in row["value"].items())
        cells = [row["name"], row["paper"], row["code"], f"{values} ({row['where']})", row.get("why", "")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def page(text: str) -> str:
    """Return the page with its tables made again."""
    for field, rows in entries().items():
        begin, end = (mark.format(field=field) for mark in MARKS)
        text = re.sub(f"{re.escape(begin)}.*{re.escape(end)}", begin + table(rows) + end, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf8")), "utf8")
