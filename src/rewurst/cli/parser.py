"""Build a command's parser from a function: its signature gives the options, its docstring their help."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from docstring_parser import parse as parse_docstring

from .. import UsageError
from ..hints import nearest

HIDDEN = ("progress",)  # parameters for callers in Python only


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line and the nearest valid name; abbreviations are not guessed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and report an unknown option before those that are missing, which it may have meant."""
        known = {option for action in self._actions for option in action.option_strings}
        for word in args or ():
            if word.startswith("--") and word != "--" and word.split("=")[0] not in known:
                self.error(f"unrecognized arguments: {word}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise with the message and what it may have meant."""
        if wrong := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            near = nearest(wrong[1], re.findall(r"[^\s',]+", wrong[2]))
        else:
            known = [option for action in self._actions[1:] for option in action.option_strings]  # without --help
            words = [word.strip("':,").split("=")[0] for word in message.split()]
            near = [match for word in words if word not in known for match in get_close_matches(word, known, 1)]
        raise UsageError(message + (f"; did you mean {near[0]!r}?" if near else ""))


def call(
    function: Callable[..., Any], args: Sequence[str], prog: str, positional: Sequence[str] = ()
) -> tuple[Any, dict[str, Any]]:
    """Parse a command line as a function's arguments, call it, and return its result and the arguments.

    Args:
        function: Function to call; dataclasses among its parameters become one option per field.
        args: Arguments on the command line.
        prog: Name of the command, for its usage.
        positional: Parameters that are given by position.
    """
    values = vars(parser_of(function, prog, positional).parse_args(args))
    return _build(function, values), values


def parser_of(function: Callable[..., Any], prog: str, positional: Sequence[str] = ()) -> Parser:
    """Return the parser of a function's arguments, see :func:`call`."""
    parsed = parse_docstring(inspect.getdoc(function) or "")
    parts = [_plain(part) for part in (parsed.short_description, parsed.long_description) if part]
    parser = Parser(prog=prog, description="\n\n".join(parts))
    _add(parser, function, positional)
    return parser


def _plain(text: str) -> str:
    """Return a docstring's text without its markup."""
    return re.sub(r":\w+:`~?([^`]+)`", lambda match: match[1].rpartition(".")[2], text).replace("``", "")


def _add(parser: Parser, function: Callable[..., Any], positional: Sequence[str]) -> None:
    documented = parse_docstring(inspect.getdoc(function) or "").params
    helps = {param.arg_name: _plain(param.description or "").replace("\n", " ") for param in documented}
    types = get_type_hints(function if inspect.isfunction(function) else function.__init__)
    for name, parameter in inspect.signature(function).parameters.items():
        if name in HIDDEN:
            continue
        kind = _without_none(types[name])
        if is_dataclass(kind):
            _add(parser, kind, ())  # type: ignore[arg-type]
            continue
        text = re.sub(r"(?<!\.)\.$", "", helps.get(name, ""))  # no full stop, but an ellipsis stays
        options: dict[str, Any] = {"help": text.replace("%", "%%"), **_parsed_as(kind)}
        if name in positional:
            parser.add_argument(name, **options | {"metavar": name.upper()})
            continue
        if parameter.default is parameter.empty:
            options["required"] = True
        elif "action" not in options:
            options["default"] = parameter.default
            if parameter.default not in (None, "") and "default" not in options["help"]:
                options["help"] += f" (default: {_shown(parameter.default)})"
        parser.add_argument(f"--{name}", **options)


def _parsed_as(kind: Any) -> dict[str, Any]:
    """Return the options of ``add_argument`` for a parameter's type."""
    if kind is bool:
        return {"action": "store_true"}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if kind == tuple[int, int]:
        return {"type": _fraction, "metavar": "I/N"}
    if kind == tuple[str, ...]:
        return {"type": _listed, "metavar": "A,B"}
    if get_origin(kind) is not None and issubclass(get_origin(kind), Sequence):
        return {"nargs": "+"}
    return {"type": str if kind == str | Path else kind, "metavar": {int: "N", float: "X"}.get(kind, "TEXT")}


def _without_none(kind: Any) -> Any:
    """Return what a parameter is if it is given."""
    if isinstance(kind, UnionType) or (get_origin(kind) is not None and type(None) in get_args(kind)):
        given = [one for one in get_args(kind) if one is not type(None)]
        return given[0] if len(given) == 1 else str | Path if set(given) == {str, Path} else kind
    return kind


def _fraction(text: str) -> tuple[int, int]:
    number, slash, total = text.partition("/")
    if not (slash and number.isdigit() and total.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} must be I/N, such as 0/4")
    return int(number), int(total)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _shown(default: Any) -> str:
    if default == (0, 1):
        return "0/1"
    return ",".join(default) if isinstance(default, tuple) else str(default)


def _build(function: Callable[..., Any], values: dict[str, Any]) -> Any:
    types = get_type_hints(function if inspect.isfunction(function) else function.__init__)
    arguments = {}
    for name in inspect.signature(function).parameters:
        kind = _without_none(types[name])
        if is_dataclass(kind):
            arguments[name] = _build(kind, values)  # type: ignore[arg-type]
        elif name in values:
            arguments[name] = values[name]
    bound = inspect.signature(function).bind_partial(**arguments)
    return function(*bound.args, **bound.kwargs)
