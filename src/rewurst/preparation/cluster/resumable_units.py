"""Preparation in units that stay when it is killed: what is being made, and which units are done.

Within a folder that is being filled, ``.preparing`` holds

1. ``plan.json``: the options, so that another preparation into the same folder is refused;
2. ``<stage>/<unit>.<digest>.json``: a record of each unit that is done, written after what the unit makes;
3. what units make for later stages.

It goes when the corpus is whole. What a unit makes depends on nothing but the unit and the plan, so that units that
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
from typing import Any, Generic, NamedTuple, TypeVar

from tqdm import tqdm

from ... import UsageError
from ..writing.destination import UNFINISHED, Target
from .ray_tasks import Ray

PLAN = f"{UNFINISHED}/plan.json"
READERS = 16  # threads that read records, which waits for a server
Record = dict[str, Any]
J = TypeVar("J")


class Unit(NamedTuple):
    """A piece of work.

    Attributes:
        name: It follows from the unit's place in the order.
        digest: Of what it reads, so that a source that changed in between is noticed.
        work: For the function.
    """

    name: str
    digest: str
    work: Any


@dataclass(frozen=True)
class Stage(Generic[J]):
    """Units of one kind; it goes to the processes that do them.

    Args:
        target: Folder that is being filled.
        name: Of the stage, and of its folder below ``.preparing``.
        function: ``function(job, unit)`` gives the record, a JSON object; importable under its name.
        job: What all units need.
    """

    target: Target
    name: str
    function: Callable[[J, Unit], Record]
    job: J

    def record(self, unit: Unit) -> str:
        """Where the record of a unit lies."""
        return f"{UNFINISHED}/{self.name}/{unit.name}.{unit.digest}.json"


def begin(target: Target, plan: Mapping[str, Any], layout: re.Pattern[str], overwrite: bool) -> None:
    """Make the folder, or go on in it.

    Args:
        target: The folder.
        plan: What decides the bytes.
        layout: Pattern of the files that may be overwritten.
        overwrite: Begin anew, whatever was prepared there.

    Raises:
        UsageError: It holds something else.
    """
    target.refuse_file()
    content = json.dumps(plan, sort_keys=True)
    before = None if overwrite else target.read(PLAN)
    if before is not None:
        _compare(target, json.loads(before), json.loads(content))
        return
    names = target.names()
    if names and not overwrite:
        raise UsageError(f"out {target} is not empty; choose another folder or add --overwrite")
    for name in names:
        if not layout.fullmatch(name):
            raise UsageError(f"out {target} holds {name}, which preparation does not make: not overwritten")
    if names:
        target.remove()
    target.write(PLAN, content + "\n")


def _compare(target: Target, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in now:
        if before.get(name) != now[name]:
            raise UsageError(
                f"out {target} was begun with {name} {before.get(name)}, not {now[name]}: give the same again to go "
                "on, add --overwrite to begin anew, or choose another folder"
            )


def complete(
    stage: Stage[Any], units: Iterable[Unit], ray: Ray, bar: tqdm[Any], look: Callable[[Record], None] | None = None
) -> list[Record]:
    """The records of all units in their order; those that were done before are not done again.

    Args:
        stage: What is done.
        units: In their order.
        ray: Who does it.
        bar: Counts units.
        look: Is shown each record, in no order, and may raise.

    Raises:
        UsageError: A source has changed since its unit was done, and what units raise.
    """
    known = _known(stage)
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
                    "add --overwrite to begin anew"
                )

    def take(name: str, record: Record) -> None:
        bar.update()
        if look is not None:
            look(record)
        records[name] = record

    for _, (name, record) in ray.run(_do, stage, left()):
        take(name, record)
    with ThreadPoolExecutor(READERS) as pool:
        for name, record in pool.map(lambda unit: _read(stage, unit), done):
            take(name, record)
    return [records[name] for name in names]


def _known(stage: Stage[Any]) -> dict[str, str]:
    """Digests of units that are done, by their names."""
    found = {}
    for path in stage.target.names(f"{UNFINISHED}/{stage.name}"):
        name, _, rest = path.rpartition("/")[2].partition(".")
        digest, dot, suffix = rest.rpartition(".")
        if dot and suffix == "json":
            found[name] = digest
    return found


def _do(stage: Stage[Any], unit: Unit) -> tuple[str, Record]:
    record = stage.function(stage.job, unit)
    stage.target.write(stage.record(unit), json.dumps(record))
    return unit.name, record


def _read(stage: Stage[Any], unit: Unit) -> tuple[str, Record]:
    content = stage.target.read(stage.record(unit))
    if content is None:
        raise UsageError(f"{stage.target.where(stage.record(unit))}: it has gone; start again")
    record: Record = json.loads(content)
    return unit.name, record


def digest_of(*values: Any) -> str:
    """Sixteen hexadecimal digits that stand for values of JSON."""
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()


def unit_bar(what: str, total: int | None, progress: bool) -> tqdm[Any]:
    """A progress bar on stderr."""
    return tqdm(total=total, unit=" units", desc=what, disable=not progress, file=sys.stderr)
