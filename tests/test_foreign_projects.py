"""Our callbacks in projects of other kinds: stopped and resumed, with accumulation, on one process and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
from foreign_projects import BATCHES, PROJECTS, compare
from ranks import run_ranks

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*exists and is not empty", "ignore:'set_vital' is deprecated", "ignore:.*dataloader is not resumable"
)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", PROJECTS)
def test_a_stopped_run_ends_on_the_same_bits(kind: str, accumulation: int, tmp_path: Path) -> None:
    for stop in (2 * accumulation, BATCHES + 2):  # within the first epoch, and within the second
        compare(kind, tmp_path / str(stop), accumulation, stop)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_so_does_one_on_two_processes(accumulation: int, tmp_path: Path) -> None:
    script = Path(__file__).parent / "support" / "foreign_projects.py"
    said = run_ranks(script, str(tmp_path), str(accumulation), processes=2)
    assert said.count("ok ") == 2 * len(PROJECTS)
