"""``rewurst reproduce``: the papers' experiments on this machine, and a report of what held."""

from __future__ import annotations

import os
from pathlib import Path

from .. import UsageError
from ..tools import Parsed, Parser
from .scales import SCALES

DESCRIPTION = "Runs the papers' experiments and reports which of their claims held. The same command goes on."


def run(args: list[str]) -> None:
    """``reproduce continual --out DIR ...``."""
    parsed = _parser().parse_args(args[1:])
    parsed.run(parsed)


def _parser() -> Parser:
    parser = Parser(prog="rewurst reproduce", description=DESCRIPTION)
    what = parser.add_subparsers(dest="what", required=True, parser_class=Parser)
    continual = what.add_parser("continual", help="Gupta et al. 2023 and Ibrahim et al. 2024", description=DESCRIPTION)
    continual.set_defaults(run=_continual)
    continual.add_argument("--out", type=Path, required=True, help="folder for data, runs and report")
    continual.add_argument("--scale", choices=sorted(SCALES), default="tiny", help="size of models and data")
    continual.add_argument("--seeds", type=int, default=3, help="runs of everything, with other seeds")
    continual.add_argument("--jobs", type=int, help="runs at a time (default: one a core at tiny, else 1)")
    continual.add_argument("--old", nargs="+", metavar="SOURCE", help="corpus learnt first (default: the scale's own)")
    continual.add_argument("--new", nargs="+", metavar="SOURCE", help="corpus learnt then")
    continual.add_argument("--tokenizer", help="folder or hub name (default: one is trained over both corpora)")
    continual.add_argument("--report_only", action="store_true", help="write the report of the runs that are there")
    return parser


def _continual(args: Parsed) -> None:
    from .continual import Options, reproduce

    if args.seeds < 1:
        raise UsageError(f"--seeds is {args.seeds}, expected 1 or more")
    if args.jobs is not None and args.jobs < 1:
        raise UsageError(f"--jobs is {args.jobs}, expected 1 or more")
    if (args.old is None) != (args.new is None):
        raise UsageError("--old and --new go together: give both corpora or neither")
    scale = SCALES[args.scale]
    at_once = args.jobs or scale.jobs or os.cpu_count() or 1
    reproduce(Options(args.out, scale, args.seeds, at_once, args.old, args.new, args.tokenizer, args.report_only))
