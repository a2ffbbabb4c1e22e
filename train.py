"""The command line: ``rewurst`` and ``python train.py`` are the same program.

``fit``, ``validate``, ``test`` and ``predict`` are LightningCLI's over every module and data module; the other commands
are tools. Nothing heavy is imported before it is known which one runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rewurst import UsageError, __version__
from rewurst.cli.tools import TOOLS, listing
from rewurst.hints import closest

LIGHTNING = ("fit", "validate", "test", "predict")


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line (default: the process's own) and return its exit status."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return 0
    if args[0] == "--version":
        print(__version__)
        return 0
    try:
        _run(args)
    except (UsageError, FloatingPointError) as error:
        if os.environ.get("REWURST_TRACEBACK"):
            raise
        print(f"rewurst {args[0]}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except BrokenPipeError:
        return 1
    return 0


def _run(args: list[str]) -> None:
    """Import what a command needs, and run it."""
    name = args[0]
    if name in TOOLS:
        from rewurst.cli.tools import run
    elif name in LIGHTNING:
        from rewurst.cli.lightning import run
    elif name == "schedule":
        from rewurst.cli.schedule_plot import run
    elif name == "plan":
        from rewurst.memory.command import run
    else:
        known = [*LIGHTNING, "schedule", "plan", *TOOLS]
        raise UsageError(f"no command {name!r}{closest(name, known) or '; there are ' + ', '.join(known)}")
    run(args)


def _help() -> str:
    return f"""rewurst {__version__}: train large models without wasting compute

usage: rewurst COMMAND [--help] ...

  fit | validate | test | predict
                            train or evaluate any module on any data module (LightningCLI):
                            --config FILE [--config MORE] [--ckpt_path FILE | auto | auto:FOLDER]
  schedule                  draw a config's learning rate and replay share before training
  plan                      estimate a config's memory per device and its largest micro-batch
{chr(10).join(map(listing, TOOLS))}

`rewurst COMMAND --help` describes a command. Errors are one line with exit status 2; REWURST_TRACEBACK=1 shows where
they come from."""


if __name__ == "__main__":
    sys.exit(main())
