"""Build the parts of the site that are not files of this folder: navigation, API pages, the home page from README.

1. ``on_config`` lists every page: a new file in docs/, docs/reports/ or docs/notes/ appears in the navigation.
2. ``on_files`` makes a page from each public name's docstring, and from the Markdown files outside of docs/.
3. ``on_page_markdown`` turns links that leave docs/ into links to those pages, or into plain names of files.
4. ``on_page_content`` turns references of docstrings (:class:`...`) into names.
"""

from __future__ import annotations

import ast
import html
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {  # pages of the site from files of the repository
    "README.md": "index.md",
    "CHANGELOG.md": "repository/changelog.md",
    "CONTRIBUTING.md": "repository/contributing.md",
    "benchmarks/README.md": "repository/benchmarks.md",
    "configs/continual/README.md": "repository/recipes.md",
}
GUIDES = ["from_the_papers", "callbacks", "data", "wuerstchen", "evaluation"]  # first; others follow by name
API = {"callbacks": "One page each", "modules": "", "modules.networks": "", "datamodules": ""}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
REFERENCE = re.compile(r":(?:class|func|meth|mod|data|attr):<code>~?([\w.]+)</code>")


def public_names(package: str) -> dict[str, str]:
    """Return the public names of a package and where each is defined, without importing anything."""
    folder = ROOT / package.replace(".", "/")
    defined: dict[str, str] = {}
    for node in ast.walk(ast.parse((folder / "__init__.py").read_text(encoding="utf8"))):
        if isinstance(node, ast.ImportFrom) and node.level and node.module:
            where = f"rewurst.{package}.{node.module}" if node.level == 1 else f"rewurst.{node.module}"
            file = folder / f"{node.module.replace('.', '/')}.py"
            names = _all_of(file) if node.names[0].name == "*" else [alias.name for alias in node.names]
            defined |= {name: f"{where}.{name}" for name in names if not (file.with_suffix("") / f"{name}.py").exists()}
    return dict(sorted(defined.items()))


def _all_of(file: Path) -> list[str]:
    for node in ast.parse(file.read_text(encoding="utf8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError(f"{file} has no __all__")


def api_pages() -> dict[str, str]:
    """Return the Markdown of the API pages by path: one for each callback, one for each other package."""
    pages: dict[str, str] = {}
    for package in API:
        names = public_names(package)
        if package == "callbacks":
            classes = {name: where for name, where in names.items() if name[0].isupper()}
            for name, where in classes.items():
                pages[f"api/callbacks/{name}.md"] = f"::: {where}\n    options: {{heading_level: 1}}\n"
            functions = [where for name, where in names.items() if name not in classes]
            body = "\n\n".join(f"::: {where}" for where in functions)
            pages["api/callbacks/functions.md"] = f"# Schedules as functions\n\n{body}\n"
        else:
            body = "\n\n".join(f"::: {where}" for where in names.values())
            pages[f"api/{package}.md"] = f"# rewurst.{package}\n\n{body}\n"
    return pages


def outside_pages() -> dict[str, str]:
    """Return the path in the site of each file outside of docs/ that has a page."""
    return {source: page for source, page in OUTSIDE.items() if (ROOT / source).is_file()}


def on_config(config: Any) -> Any:
    """Set the navigation."""
    docs = ROOT / "docs"
    guides = sorted(path.stem for path in docs.glob("*.md"))
    ordered = [name for name in GUIDES if name in guides] + [name for name in guides if name not in GUIDES]
    tutorials = sorted(path.relative_to(docs).as_posix() for path in (docs / "tutorials").glob("*.md"))
    reports = sorted(path.relative_to(docs).as_posix() for path in (docs / "reports").rglob("*.md"))
    notes = sorted(path.relative_to(docs).as_posix() for path in (docs / "notes").glob("*.md"))
    api = sorted(api_pages())
    of_callbacks = [page for page in api if page.startswith("api/callbacks/")]
    config.nav = [
        {"Home": "index.md"},
        {"Tutorials": tutorials},
        {"Guides": [f"{name}.md" for name in ordered]},
        *([{"Reports": reports}] if reports else []),
        *([{"Notes": notes}] if notes else []),
        {"API": [{"Callbacks": of_callbacks}, *(page for page in api if page not in of_callbacks)]},
        {"Project": [page for source, page in outside_pages().items() if source != "README.md"]},
    ]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    made = {page: (ROOT / source).read_text(encoding="utf8") for source, page in outside_pages().items()}
    for path, content in (made | api_pages()).items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links that leave docs/, as seen from the file that the page's text comes from."""
    here = page.file.src_uri
    source = next((source for source, made in outside_pages().items() if made == here), f"docs/{here}")

    def link(match: re.Match[str]) -> str:
        mark, text, target, anchor = match.groups()
        if "://" in target or target.startswith(("mailto:", "/")):
            return match.group()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        inside = outside_pages().get(path) or outside_pages().get(f"{path}/README.md")
        if inside is None and path.startswith("docs/"):
            inside = path.removeprefix("docs/")
        if inside is not None:
            return f"{mark}[{text}]({posixpath.relpath(inside, posixpath.dirname(here) or '.')}{anchor or ''})"
        return text if (ROOT / path).exists() else match.group()  # a name of what is in the repository only

    return LINK.sub(link, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Turn Sphinx's references into names, and its ``Example::`` into text."""

    def name(match: re.Match[str]) -> str:
        return f"<code>{html.escape(match.group(1).rpartition('.')[2])}</code>"

    return REFERENCE.sub(name, content).replace("<p>Example::</p>", "<p>Example:</p>")
