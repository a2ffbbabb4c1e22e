"""Change one argument of a config's callback from the command line: ``--trainer.callbacks.NAME.ARGUMENT VALUE``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ... import UsageError
from ...hints import closest

_OPTION = re.compile(r"--trainer\.callbacks\.([A-Z]\w*)(?:\.(\d+))?\.([\w.]+)(?:=(.*))?", re.DOTALL)


@dataclass(frozen=True)
class Change:
    """One option of the command line.

    Args:
        name: Class name of the callback.
        number: Which one of several of this class, from 0 on; None if there is one.
        path: Names of the argument, and of arguments within it.
        text: Value as it was typed.
    """

    name: str
    number: int | None
    path: tuple[str, ...]
    text: str

    @property
    def option(self) -> str:
        """The option, for messages."""
        number = "" if self.number is None else f".{self.number}"
        return f"--trainer.callbacks.{self.name}{number}.{'.'.join(self.path)}"


def take_changes(args: Sequence[str]) -> tuple[list[str], list[Change]]:
    """Split a command line into what the parser knows and changes of named callbacks."""
    rest: list[str] = []
    changes = []
    words = iter(args)
    for word in words:
        match = _OPTION.fullmatch(word)
        if match is None:
            rest.append(word)
            continue
        name, number, path, text = match.groups()
        text = next(words, None) if text is None else text
        change = Change(name, None if number is None else int(number), tuple(path.split(".")), text or "")
        if text is None:
            raise UsageError(f"{change.option} needs a value")
        changes.append(change)
    return rest, changes


def apply_changes(callbacks: list[Any], changes: Sequence[Change], parse: Callable[[dict[str, Any]], Any]) -> None:
    """Change arguments of callbacks in a parsed config.

    Args:
        callbacks: Callbacks of the config, with ``class_path`` and ``init_args``; changed in place.
        changes: What to change.
        parse: Checks the settings of one callback, and returns them parsed.

    Raises:
        UsageError: There is no such callback or argument, or several callbacks of this class.
    """
    for change in changes:
        index = _find([item["class_path"].rpartition(".")[2] for item in callbacks], change)
        settings = callbacks[index].as_dict() if hasattr(callbacks[index], "as_dict") else dict(callbacks[index])
        _set(settings, change)
        callbacks[index] = parse(settings)


def _find(names: list[str], change: Change) -> int:
    found = [index for index, name in enumerate(names) if name == change.name]
    if not found:
        raise UsageError(
            f"{change.option}: the config has no callback {change.name!r}{closest(change.name, names) or _those(names)}"
        )
    if change.number is None and len(found) > 1:
        raise UsageError(
            f"{change.option}: the config has {len(found)} of them: number them, "
            f"--trainer.callbacks.{change.name}.0.{'.'.join(change.path)}"
        )
    if (change.number or 0) >= len(found):
        raise UsageError(f"{change.option}: the config has {len(found)} of them, numbered from 0")
    return found[change.number or 0]


def _those(names: list[str]) -> str:
    return f"; it has {', '.join(sorted(set(names)))}" if names else ""


def _set(settings: dict[str, Any], change: Change) -> None:
    place: Any = settings
    for name in change.path[:-1]:
        place = _inside(place)
        if not isinstance(place.get(name), dict):
            raise UsageError(f"{change.option}: {name!r} has no arguments in the config")
        place = place[name]
    _inside(place)[change.path[-1]] = _value(change.text)


def _inside(place: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of what has a class, which may have none yet."""
    if "class_path" not in place:
        return place
    arguments: dict[str, Any] = place.setdefault("init_args", {})
    return arguments


def _value(text: str) -> Any:
    for kind in (int, float):  # YAML 1.1 takes 1e-3 for a text
        try:
            return kind(text)
        except ValueError:
            continue
    return yaml.safe_load(text)
