"""The rules of the layout: imports only go down, no cycles, and few files per folder."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "rewurst"
# A room may import what stands in a later line, and its own files.
FLOORS = (
    ("train",),
    ("reproduce",),
    ("memory",),
    ("cli",),
    ("preparation", "evaluation"),
    ("modules", "datamodules", "callbacks"),
    ("checkpoints",),
    ("tokenizer_meaning",),
    ("tokenizer_files",),
    ("files",),
    ("lightning_compat",),
    ("hints",),
    ("dtensor",),
    ("__init__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MOST_FILES = 12


def _files(package: Path) -> dict[str, Path]:
    """Map dotted names below the package to paths of modules; ``modules.losses`` is the room's ``__init__``."""
    found = {}
    for folder, _, names in os.walk(package, followlinks=True):
        for name in names:
            if name.endswith(".py"):
                path = Path(folder) / name
                found[".".join(path.relative_to(package).with_suffix("").parts)] = path
    return found


def _imported(name: str, node: ast.stmt, modules: dict[str, Path]) -> Iterator[str]:
    """Return the names of the package's modules that an import statement of module ``name`` reads."""
    if isinstance(node, ast.Import):
        bases = [(alias.name, list[str]()) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        above = f"rewurst.{name}".split(".")[: -node.level] if node.level else []
        bases = [(".".join([*above, *([node.module] if node.module else [])]), [alias.name for alias in node.names])]
    else:
        return
    for base, names in bases:
        if base != "rewurst" and not base.startswith("rewurst."):
            continue
        base = base.removeprefix("rewurst").removeprefix(".")
        for part in names or [""]:
            whole = f"{base}.{part}".strip(".")
            package = f"{base}.__init__".strip(".")
            yield next(m for m in (whole, f"{whole}.__init__", base, package) if m in modules)


def _imports(package: Path) -> list[tuple[str, str, bool]]:
    """Yield (importing module, imported module, whether it happens when the first is imported)."""
    modules = _files(package)
    found = []
    for name, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf8"))
        at_once = {id(node) for node in tree.body}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                found += [(name, other, id(node) in at_once) for other in _imported(name, node, modules)]
    return found


def _room(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


def _upward(imports: list[tuple[str, str, bool]]) -> list[str]:
    return [
        f"{name} imports {other}"
        for name, other, _ in imports
        if _room(name) != _room(other) and FLOOR[_room(other)] <= FLOOR[_room(name)]
    ]


def _circles(imports: list[tuple[str, str, bool]]) -> list[str]:
    """Return the modules that import themselves through others when they are imported."""
    # A package's __init__ that hands names on is not counted: its rooms are imported by their files.
    below: dict[str, set[str]] = {}
    for name, other, at_once in imports:
        if at_once and not name.endswith("__init__") and not other.endswith("__init__"):
            below.setdefault(name, set()).add(other)

    def reached(start: str) -> set[str]:
        seen, todo = set[str](), [start]
        while todo:
            for other in below.get(todo.pop(), set()) - seen:
                seen.add(other)
                todo.append(other)
        return seen

    return sorted(name for name in below if name in reached(name))


def _external(package: Path, room: str, library: str) -> list[str]:
    found = []
    for name, path in _files(package).items():
        if name.startswith(f"{room}."):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                found += [f"{name} imports {other}" for other in names if other.split(".")[0] in library.split()]
    return found


def test_imports_go_down_only() -> None:
    assert _upward(_imports(PACKAGE)) == []


def test_no_module_imports_itself_through_others() -> None:
    assert _circles(_imports(PACKAGE)) == []


def test_networks_know_no_lightning() -> None:
    assert _external(PACKAGE, "modules.networks", "lightning pytorch_lightning") == []


def _private_lightning(package: Path) -> list[str]:
    """Return attributes of trainers and names imported from Lightning that begin with an underscore."""
    found = []
    for name, path in _files(package).items():
        if name == "lightning_compat":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning"):
                found += [f"{name}: {alias.name}" for alias in node.names if alias.name.startswith("_")]
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                owner = ast.unparse(node.value)
                if re.search(r"\btrainer\b|_loop\b|\bstrategy\b|connector\b", owner):
                    found.append(f"{name}: {owner}.{node.attr}")
    return found


def test_private_names_of_lightning_are_in_one_file() -> None:
    assert _private_lightning(PACKAGE) == []


def test_a_private_name_of_lightning_is_noticed(tmp_path: Path) -> None:
    lines = ["from lightning.fabric.utilities.rank_zero import _get_rank", "trainer.fit_loop._should_accumulate()"]
    _write(tmp_path, {"callbacks/a.py": "\n".join(lines)})
    assert _private_lightning(tmp_path) == [
        "callbacks.a: _get_rank",
        "callbacks.a: trainer.fit_loop._should_accumulate",
    ]


def test_a_folder_has_few_files() -> None:
    folders: dict[Path, int] = {}
    for path in _files(PACKAGE).values():
        folders[path.parent] = folders.get(path.parent, 0) + 1
    assert {str(folder): count for folder, count in folders.items() if count > MOST_FILES} == {}


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"callbacks/a.py": "from ..modules import b", "modules/b.py": ""}, "callbacks.a imports modules.b"),
        ({"datamodules/a.py": "import rewurst.modules.b", "modules/b.py": ""}, "datamodules.a imports modules.b"),
        ({"files.py": "def f():\n    from .cli.x import y", "cli/x.py": "y = 1"}, "files imports cli.x"),
        ({"preparation/a.py": "import rewurst.cli.b", "cli/b.py": ""}, "preparation.a imports cli.b"),
    ],
)  # fmt: skip
def test_a_broken_rule_is_noticed(tmp_path: Path, files: dict[str, str], complaint: str) -> None:
    _write(tmp_path, files)
    assert _upward(_imports(tmp_path)) == [complaint]


def test_a_circle_and_lightning_are_noticed(tmp_path: Path) -> None:
    lightning = {"modules/networks/c.py": "from lightning.pytorch import Trainer"}
    _write(tmp_path, {"modules/a.py": "from .b import x", "modules/b.py": "from . import a", **lightning})
    assert _circles(_imports(tmp_path)) == ["modules.a", "modules.b"]
    assert _external(tmp_path, "modules.networks", "lightning") == ["modules.networks.c imports lightning.pytorch"]


def _write(package: Path, files: dict[str, str]) -> None:
    for name, content in {"__init__.py": "", **files}.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in path.relative_to(package).parents:
            (package / folder / "__init__.py").touch()
        path.write_text(content)
