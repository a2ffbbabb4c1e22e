"""Preparation in units that survive a kill: what is being prepared, and which units are done.

A folder that is being filled has a folder ``.preparing`` with

1. ``plan.json``: the options, so that another preparation into the same folder is refused;
2. ``<stage>/<unit>.<digest>.json``: a record of each unit that is done, written after what the unit makes;
3. what units make for later stages.

It is deleted when the corpus is complete. What a unit makes depends only on the unit and the plan, so that units that
are done twice, at different times or at once, write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from tqdm import tqdm

from ... import UsageError
from ..writing.destination import UNFINISHED, Target

PLAN = f"{UNFINISHED}/plan.json"
READERS = 16  # threads that read records, because reading waits for a server
Record = dict[str, Any]
J = TypeVar("J")


class Engine(Protocol):
    """Runs units somewhere: :class:`.local_pool.LocalPool` or :class:`.ray_tasks.Ray`."""

    def run(self, function: Callable[[Any, Any], Any], job: Any, units: Iterable[tuple[str, Any]]) -> Iterator[Any]:
        """Yield the name and ``function(job, unit)`` of every unit, in the order in which they are done."""


class Unit(NamedTuple):
    """A piece of work.

    Attributes:
        name: Name that follows from the unit's place in the order.
        digest: Digest of what the unit reads, so that a source that changed in between is noticed.
        work: Argument of the stage's function.
    """

    name: str
    digest: str
    work: Any


@dataclass(frozen=True)
class Stage(Generic[J]):
    """Units of one kind; sent to the processes that do them.

    Args:
        target: Folder that is being filled.
        name: Name of the stage, and of its folder below ``.preparing``.
        function: Function that does a unit: ``function(job, unit)`` returns the record, a JSON object. It can be
            imported by its name.
        job: What all units share.
    """

    target: Target
    name: str
    function: Callable[[J, Unit], Record]
    job: J

    def record(self, unit: Unit) -> str:
        """Return the path of a unit's record below the target."""
        return f"{UNFINISHED}/{self.name}/{unit.name}.{unit.digest}.json"

    def done(self) -> dict[str, str]:
        """Return the digests of the units that are done, by their names."""
        found = {}
        for path in self.target.names(f"{UNFINISHED}/{self.name}"):
            name, _, rest = path.rpartition("/")[2].partition(".")
            digest, dot, suffix = rest.rpartition(".")
            if dot and suffix == "json":
                found[name] = digest
        return found

    def read(self, unit: Unit) -> Record:
        """Return the record of a unit that is done."""
        content = self.target.read(self.record(unit))
        if content is None:
            raise UsageError(f"{self.target.where(self.record(unit))}: the file is gone; start again")
        record: Record = json.loads(content)
        return record


def begin(target: Target, plan: Mapping[str, Any], layout: re.Pattern[str], overwrite: bool) -> None:
    """Make the folder, or resume in it.

    Args:
        target: Folder to fill.
        plan: Everything that decides the bytes.
        layout: Pattern of the files that may be overwritten.
        overwrite: Delete what was prepared there and start over.

    Raises:
        UsageError: The folder contains something else, or a preparation with another plan.
    """
    target.refuse_file()
    content = json.dumps(plan, sort_keys=True)
    before = None if overwrite else target.read(PLAN)
    if before is not None:
        if any(name.endswith(".json") and name != PLAN for name in target.names(UNFINISHED)):
            _compare(target, json.loads(before), json.loads(content))
        else:  # nothing is done yet, so nothing is lost
            target.write(PLAN, content + "\n")
        return
    names = target.names()
    if PLAN in names and not overwrite:  # another process has just begun the same
        begin(target, plan, layout, overwrite)
        return
    if names and not overwrite:
        raise UsageError(f"out {target} is not empty; choose another folder or add --overwrite")
    for name in names:
        if not layout.fullmatch(name):
            raise UsageError(f"out {target} has {name}, which preparation does not make: not overwritten")
    if names:
        target.remove()
    target.write(PLAN, content + "\n")


def _compare(target: Target, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in now:
        if before.get(name) != now[name]:
            raise UsageError(
                f"out {target} was started with {name} {before.get(name)}, not {now[name]}: give the same value to "
                "resume, add --overwrite to start over, or choose another folder"
            )


def finish(target: Target, stages: Iterable[str]) -> None:
    """Delete ``.preparing``, the plan last: a corpus that has its index never looks like one to resume for long."""
    for stage in stages:
        target.remove(f"{UNFINISHED}/{stage}")
    target.remove(UNFINISHED)


def complete(
    stage: Stage[Any],
    units: Iterable[Unit],
    engine: Engine,
    bar: tqdm[Any],
    amount: Callable[[Record], int] = lambda record: 1,
    check: Callable[[Record], None] = lambda record: None,
) -> dict[str, Record]:
    """Do all units that are not done yet, and return the records of all of them by name, in their order.

    Args:
        stage: Function and job.
        units: Units in their order.
        engine: Engine that runs the units.
        bar: Progress bar.
        amount: Progress of a record, in the bar's unit.
        check: Function that sees each record, in no order, and may raise.

    Raises:
        UsageError: A source has changed since its unit was done, or a unit raised it.
    """
    known = stage.done()
    names, done, records = list[str](), list[Unit](), dict[str, Record]()

    def left() -> Iterator[tuple[str, Unit]]:
        for unit in units:
            names.append(unit.name)
            digest = known.get(unit.name)
            if digest is None:
                yield f"{stage.name} {unit.name}", unit
            elif digest == unit.digest:
                done.append(unit._replace(work=None))
            else:
                raise UsageError(
                    f"out {stage.target}: the source of {stage.name} {unit.name} has changed since it was prepared; "
                    "add --overwrite to start over"
                )

    def take(name: str, record: Record) -> None:
        bar.update(amount(record))
        check(record)
        records[name] = record

    for _, (name, record) in engine.run(_do, stage, left()):
        take(name, record)
    with ThreadPoolExecutor(READERS) as pool:
        for unit, record in zip(done, pool.map(stage.read, done), strict=True):
            take(unit.name, record)
    return {name: records[name] for name in names}


def _do(stage: Stage[Any], unit: Unit) -> tuple[str, Record]:
    record = stage.function(stage.job, unit)
    stage.target.write(stage.record(unit), json.dumps(record))
    return unit.name, record


def digest_of(*values: Any) -> str:
    """Return sixteen hexadecimal digits that stand for values of JSON."""
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()


def progress_bar(what: str, unit: str, total: int | None, progress: bool) -> tqdm[Any]:
    """Return a progress bar on stderr."""
    return tqdm(total=total, unit=f" {unit}", unit_scale=True, desc=what, disable=not progress, file=sys.stderr)
