"""Argument parser of the tools, whose errors are one line."""

from __future__ import annotations

import argparse
from difflib import get_close_matches
from typing import Any, NoReturn

from .. import UsageError

Parsed = argparse.Namespace


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line and the nearest valid name; abbreviations are not guessed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raises with the message and what it may have meant."""
        known = [option for action in self._actions for option in action.option_strings]
        known += [choice for action in self._actions if action.choices for choice in map(str, action.choices)]
        words = [word.strip("':,").split("=")[0] for word in message.split()]
        nearest = [match for word in words if word not in known for match in get_close_matches(word, known, 1)]
        raise UsageError(message + (f"; did you mean {nearest[0]!r}?" if nearest else ""))
