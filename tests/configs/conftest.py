"""Fixtures that parse recipes with the command line's parser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser
from recipes import ROOT, Config, Parse, command

from rewurst.cli import lightning as cli


class Built(Exception):  # noqa: N818  # no error
    """Raised to get the parser out of the command line."""


@pytest.fixture(scope="module")
def parser() -> Iterator[LightningArgumentParser]:
    """Return the command line's parser, built once."""

    def carry_out(self: cli.CLI, parser: LightningArgumentParser, args: Any) -> None:
        raise Built(parser)

    precision = torch.get_float32_matmul_precision()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(cli.CLI, "parse_arguments", carry_out)
        with pytest.raises(Built) as built:
            cli.run(["fit"])
        yield built.value.args[0]
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="module")
def parse(parser: LightningArgumentParser) -> Parse:
    """Parse the command of a config."""
    known: dict[tuple[str, ...], Config] = {}

    def parse(recipe: str, *more: str) -> Config:
        if (recipe, *more) not in known:
            args = [*command(ROOT / "configs" / "continual" / f"{recipe}.yaml"), *more]
            known[recipe, *more] = parser.parse_args(args).fit.as_dict()
        return known[recipe, *more]

    return parse
