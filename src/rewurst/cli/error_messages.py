"""One line out of what jsonargparse says, with the nearest valid name.

Its messages list every alternative that was tried, which for a class with a typo fills a screen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer

from ..callbacks import Schedule
from ..hints import closest, did_you_mean
from .options.class_names import public_names

_BASES: tuple[type, ...] = (LightningModule, LightningDataModule, Callback, Logger, Strategy, Optimizer, Schedule)
_LONGEST = 400


def one_line(message: str, parser: Any) -> str:
    """Return the message in one line: what is wrong, its value, and the nearest name that would be right.

    Args:
        message: What the parser says.
        parser: The parser, whose options are candidates.
    """
    for pattern, explain in _PATTERNS:
        match = re.search(pattern, message)
        if match is not None:
            return explain(match, parser)
    return _shortened(message)


def _unknown_class(match: re.Match[str], parser: Any) -> str:
    name = match[1].strip("'\"")
    keys = re.findall(r'Parser key "([^"]+)"', match.string)
    where = f"{keys[0]}: " if keys else ""
    known = {cls.__name__ for cls in _classes()} | set(public_names())
    for choices in re.findall(r"typing\.Literal\[([^\]]+)\]", match.string):  # where a name will do for a class
        known |= set(re.findall(r"'([^']+)'", choices))
    return f"{where}there is no class {name!r}{_nearest(name.rsplit('.', 1)[-1], known)}"


def _unknown_options(match: re.Match[str], parser: Any) -> str:
    # After a subclass option the parser reports what it made of it; the value behind it is not an option.
    names = [word.lstrip("-").split("=")[0] for word in match[1].split() if word.startswith("--")] or [match[1]]
    kind = next(iter(getattr(parser, "groups", None) or {}), "") if getattr(parser, "_inner_parser", False) else ""
    if kind in _UNNAMED:
        return "; ".join(_UNNAMED[kind].format(name=name) for name in names)
    known = set(_options(parser)) - set(names)
    if kind:
        where = _NAME_IT if kind in {cls.__name__ for cls in _classes(Callback)} else ""
        hints = {name: (_nearest_option(name, known) or _listed(known)) + where.format(name=name) for name in names}
        return "; ".join(f"{kind} has no option {name!r}{hint}" for name, hint in hints.items())
    return "; ".join(f"there is no option {name!r}{_nearest_option(name, known)}" for name in names)


_NAME_IT = " (of another callback: --trainer.callbacks.NAME.{name})"
_UNNAMED = {
    "Callback": "there is no option {name!r} of trainer.callbacks: name the callback, as in "
    "--trainer.callbacks.NAME.{name}",
    "LightningDataModule": "there is no option {name!r} of data, because no data module is named: give --config "
    "with the base config first, or --data CLASS",
    "LightningModule": "there is no option {name!r} of model, because no module is named: give --config with the base "
    "config first, or --model CLASS",
}
"""What to say where a class is not known yet, by the base class that the parser has instead."""


def _listed(known: set[str]) -> str:
    names = sorted(name for name in known if re.fullmatch(r"\w+", name) and name not in ("help", "print_shtab"))
    return f"; it has {', '.join(names)}" if names else ""


def _already_one_line(match: re.Match[str], parser: Any) -> str:
    """Return the message about one alternative among several."""
    return match[1]


def _wrong_type(match: re.Match[str], parser: Any) -> str:
    return f"{match[1]}: {match[3].strip()!r} is not of type {match[2]}"


def _no_such_file(match: re.Match[str], parser: Any) -> str:
    path = Path(match[1])
    return f"{path} does not exist{did_you_mean(path)}"


_PATTERNS: list[tuple[str, Callable[[re.Match[str], Any], str]]] = [
    (r"Expected a dot import path string: (\S+)", _unknown_class),
    (r"Option '([^']+)' is not accepted", _unknown_options),
    (r"does not accept option '([^']+)'", _unknown_options),
    (r"- ((?:there is|\w+ has) no option '[^']+'[^\n]*)", _already_one_line),
    (r"File does not exist: '([^']+)'", _no_such_file),
    (r"unrecognized arguments: (.*)", _unknown_options),
    (r"Parser key \"([^\"]+)\":\s+Expected an? <class '(\w+)'>. Got value: (.*)", _wrong_type),
]


def _nearest_option(name: str, known: set[str]) -> str:
    """Return the nearest full name, the nearest last part behind the same path, or the nearest last part anywhere."""
    path, _, last = name.rpartition(".")
    first = name.partition(".")[0]
    best = get_close_matches(name, known, 1)
    if path and first not in {word.partition(".")[0] for word in known}:
        best = get_close_matches(first, {word.partition(".")[0] for word in known}, 1)
    if not best:
        scope = {word for word in known if not path or word.startswith(f"{path}.")}
        best = get_close_matches(last, {word.rpartition(".")[2] for word in scope}, 1, cutoff=0.75)
        best = sorted((word for word in scope if best and word.rpartition(".")[2] == best[0]), key=len)
    return f"; did you mean {best[0]!r}?" if best else ""


def _nearest(name: str, known: set[str]) -> str:
    return closest(name, known) or "; a class outside rewurst and Lightning needs its full path"


def _options(parser: Any) -> Iterator[str]:
    for action in parser._actions:
        yield from (option.lstrip("-") for option in action.option_strings if option.startswith("--"))
        if isinstance(action.choices, dict):
            for child in action.choices.values():
                yield from _options(child)


def _classes(*bases: type) -> Iterator[type]:
    waiting = list(bases or _BASES)
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        yield cls


def _shortened(message: str) -> str:
    line = re.sub(r"\s+", " ", message.replace("Does not validate against any of the Union subtypes", "")).strip(" -")
    line = line.replace("<class 'NoneType'>", "null")
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 4]} ..."
