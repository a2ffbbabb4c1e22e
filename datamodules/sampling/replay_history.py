"""Record in checkpoints which rows were learned from each corpus and in which order: replay repeats them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ... import UsageError


@dataclass(frozen=True)
class Reading:
    """Record of how a corpus was read when it was learned.

    Args:
        seed: Seed of the order.
        shuffle: Kind of the order.
        rows: Number of rows read in each bucket; more than the bucket has if it was read for several epochs.
        fingerprint: Beginning of the corpus's fingerprint.
    """

    seed: int
    shuffle: Literal["full", "window"]
    rows: Sequence[int]
    fingerprint: str


class Ledger:
    """First readings by corpus, over all datasets so far.

    Args:
        readings: State returned by :meth:`state`.
    """

    def __init__(self, readings: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._readings = {name: Reading(**reading) for name, reading in (readings or {}).items()}

    def with_readings(self, readings: Iterable[tuple[str, Reading]]) -> Ledger:
        """Return a ledger with newer readings added; of two readings of one corpus, the longer one is kept."""
        ledger = Ledger()
        ledger._readings = dict(self._readings)
        for name, reading in readings:
            known = ledger._readings.get(name)
            if any(reading.rows) and (known is None or sum(reading.rows) >= sum(known.rows)):
                ledger._readings[name] = reading
        return ledger

    def reading(self, corpus: str, fingerprint: str) -> Reading | None:
        """Return how a corpus was first read; None if unknown.

        Raises:
            UsageError: The corpus of this name has changed since.
        """
        reading = self._readings.get(corpus)
        if reading is not None and not fingerprint.startswith(reading.fingerprint):
            raise UsageError(
                f"corpus {corpus!r} is not the one that was learned: its shards have changed since; "
                "restore them, or give the new corpus another name"
            )
        return reading

    def state(self) -> dict[str, dict[str, Any]]:
        """Return plain values for a checkpoint, about 100 bytes per corpus."""
        return {name: asdict(reading) for name, reading in self._readings.items()}
