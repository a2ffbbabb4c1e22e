"""The command line: ``rewurst`` and ``python train.py`` are the same program.

``fit``, ``validate``, ``test`` and ``predict`` are LightningCLI's over every module and data module; the other commands
are tools. Nothing heavy is imported before it is known which one runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from rewurst import UsageError, __version__
from rewurst.hints import closest

HELP = f"""rewurst {__version__}: training large models without wasting compute

usage: rewurst COMMAND [--help] ...

  fit | validate | test | predict   LightningCLI over all modules and data modules: --config FILE [--config MORE]
                                    [--ckpt_path FILE | auto | auto:FOLDER]
  schedule --config ... --out FILE  draw the learning rate and the replay share before anything is trained
  plan --config ... [--devices N] [--memory 80GiB]   what a device has to hold, whether it fits, the largest
                                    micro-batch
  prepare tokenizer SOURCE...       train a byte-level BPE tokenizer
  prepare text SOURCE...            tokenize text into shards
  prepare latents FOLDER ...        what a compressor makes of images into shards
  prepare verify FOLDER             compare shards with their index
  export hf CKPT OUT                write a checkpoint as a Hugging Face folder
  export weights CKPT OUT           write a checkpoint's weights as one safetensors file
  export diffusers --stage_a ...    write Würstchen checkpoints as folders that diffusers loads
  generate text FOLDER PROMPT       continue a prompt
  generate image FOLDER PROMPT      draw pictures
  evaluate FOLDER ...               benchmark tasks and perplexity of a language model, pictures of a cascade
  generate reconstruction FOLDER IMAGE   an image beside what Stage A, and Stage B from z, make of it
  reproduce continual --out DIR     run the papers' experiments and report which of their claims held

`rewurst COMMAND --help` tells more. Errors are one line, exit status 2; REWURST_TRACEBACK=1 shows where they come from.
"""

Command = Callable[[list[str]], None]


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command line (default: the process's own) and returns its exit status."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if args[0] == "--version":
        print(__version__)
        return 0
    try:
        _command(args[0])(args)
    except (UsageError, FloatingPointError) as error:
        if os.environ.get("REWURST_TRACEBACK"):
            raise
        print(f"rewurst {args[0]}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except BrokenPipeError:
        return 1
    return 0


def _command(name: str) -> Command:
    commands = {**dict.fromkeys(("fit", "validate", "test", "predict"), _lightning)}
    commands |= dict.fromkeys(("prepare", "export", "generate"), _tool)
    commands |= {"schedule": _schedule, "plan": _plan, "evaluate": _evaluate, "reproduce": _reproduce}
    if name not in commands:
        hint = closest(name, commands) or f"; there are {', '.join(commands)}"
        raise UsageError(f"no command {name!r}{hint}")
    return commands[name]


def _lightning(args: list[str]) -> None:
    from rewurst.cli.lightning import run

    run(args)


def _schedule(args: list[str]) -> None:
    from rewurst.cli.schedule_plot import run

    run(args)


def _plan(args: list[str]) -> None:
    from rewurst.memory.command import run

    run(args)


def _evaluate(args: list[str]) -> None:
    from rewurst.cli.evaluate import run

    run(args)


def _reproduce(args: list[str]) -> None:
    from rewurst.reproduce.command import run

    run(args)


def _tool(args: list[str]) -> None:
    from rewurst.cli.tools import run

    run(args)


if __name__ == "__main__":
    sys.exit(main())
