"""``rewurst reproduce``: the papers' experiments on this machine, and a report of what held."""

from __future__ import annotations

import os
from pathlib import Path

from .. import UsageError
from ..cli.parser import Parsed, Parser
from .continual.scales import SCALES

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
    _add_wuerstchen(what.add_parser("wuerstchen", help="Pernias et al. 2024", description=DESCRIPTION))
    return parser


def _add_wuerstchen(parser: Parser) -> None:
    parser.set_defaults(run=_wuerstchen)
    parser.add_argument("--out", type=Path, required=True, help="folder for data, runs and report")
    parser.add_argument("--seeds", type=int, default=1, help="runs of everything, with other seeds")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--data", metavar="DIR", help="indexed shards of captioned images (default: drawn shapes)")
    parser.add_argument("--val", metavar="DIR", help="the same, for validation")
    parser.add_argument("--image_size", type=int, help="side in pixels (default: the recipes')")
    parser.add_argument("--tokenizer", metavar="DIR", help="of captions (default: one is trained on them)")
    parser.add_argument("--inception", metavar="FILE", help="torch-fidelity's Inception weights, for FID of given data")
    parser.add_argument("--prompts", type=int, default=96, help="pictures judged of each validation corpus")
    parser.add_argument("--recipes", type=Path, metavar="DIR", help="folder with stage_{a,b,c} and single_stage.yaml")
    parser.add_argument("--report_only", action="store_true", help="write the report of the runs that are there")


def _wuerstchen(args: Parsed) -> None:
    from .wuerstchen.study import Options, reproduce

    for name in ("seeds", "jobs", "prompts", "image_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}, expected 1 or more")
    if (args.data is None) != (args.val is None):
        raise UsageError("--data and --val go together: give both folders or neither")
    names = ("out", "seeds", "data", "val", "image_size", "tokenizer", "inception", "prompts", "recipes", "report_only")
    given = {name: getattr(args, name) for name in names}
    shown = [f"--{name} {value}" for name, value in given.items() if value and name not in ("out", "report_only")]
    command = " ".join(["rewurst reproduce wuerstchen", *shown])
    reproduce(Options(**given, at_once=args.jobs, command=command))


def _continual(args: Parsed) -> None:
    from .continual.study import Options, reproduce

    if args.seeds < 1:
        raise UsageError(f"--seeds is {args.seeds}, expected 1 or more")
    if args.jobs is not None and args.jobs < 1:
        raise UsageError(f"--jobs is {args.jobs}, expected 1 or more")
    if (args.old is None) != (args.new is None):
        raise UsageError("--old and --new go together: give both corpora or neither")
    scale = SCALES[args.scale]
    at_once = args.jobs or scale.jobs or os.cpu_count() or 1
    reproduce(Options(args.out, scale, args.seeds, at_once, args.old, args.new, args.tokenizer, args.report_only))
