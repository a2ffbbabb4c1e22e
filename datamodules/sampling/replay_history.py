"""What was learnt from which corpus and in which order, kept in checkpoints: replay repeats the first reading."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ... import UsageError


@dataclass(frozen=True)
class Reading:
    """How a corpus was read when it was learnt.

    Args:
        seed: Seed of the order.
        shuffle: Kind of the order.
        rows: Rows read in each lane, from the first one on; more than it has where it was read for several epochs.
        fingerprint: Beginning of the corpus's own.
    """

    seed: int
    shuffle: Literal["full", "window"]
    rows: Sequence[int]
    fingerprint: str


class Ledger:
    """First readings by corpus, over all datasets so far.

    Args:
        readings: What an earlier :meth:`state` gave.
    """

    def __init__(self, readings: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._readings = {name: Reading(**reading) for name, reading in (readings or {}).items()}

    def with_readings(self, readings: Iterable[tuple[str, Reading]]) -> Ledger:
        """The ledger with newer readings; of two of one corpus the one that got further stands."""
        ledger = Ledger()
        ledger._readings = dict(self._readings)
        for name, reading in readings:
            known = ledger._readings.get(name)
            if any(reading.rows) and (known is None or sum(reading.rows) >= sum(known.rows)):
                ledger._readings[name] = reading
        return ledger

    def reading(self, corpus: str, fingerprint: str) -> Reading | None:
        """How a corpus was first read; none where nothing is known of it.

        Raises:
            UsageError: The corpus under this name is another one now.
        """
        reading = self._readings.get(corpus)
        if reading is not None and not fingerprint.startswith(reading.fingerprint):
            raise UsageError(
                f"corpus {corpus!r} is not the one that was learnt: its shards have changed since; "
                "put them back, or give the new ones another name"
            )
        return reading

    def state(self) -> dict[str, dict[str, Any]]:
        """Plain values for a checkpoint, about 100 bytes a corpus."""
        return {name: asdict(reading) for name, reading in self._readings.items()}
