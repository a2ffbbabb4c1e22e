"""How often each corpus has been read, and a warning when new data comes again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch.utilities import rank_zero_warn


class CorpusEpochs:
    """Counts passes over corpora; warns once for each new corpus that begins its second one.

    Args:
        rows: Number of rows by corpus; of a replayed one those of its first reading.
        new: Names of the corpora that are not replayed.
    """

    def __init__(self, rows: Mapping[str, int], new: Sequence[str]) -> None:
        self._rows = dict(rows)
        self._fresh = set(new)

    def read(self, counts: Mapping[str, int], step: int, last_step: int) -> dict[str, float]:
        """Return the passes over each corpus so far.

        Args:
            counts: Rows read by corpus since the dataset began.
            step: Completed global batches of the dataset.
            last_step: Global batches of the dataset in the whole run; 0 if the run's length is a number of epochs, so
                that repeating is what was asked for.
        """
        for name in [*self._fresh]:
            rows = self._rows[name]
            if last_step and counts[name] > rows:
                self._fresh.remove(name)
                times = counts[name] * last_step / step / rows
                rank_zero_warn(
                    f"corpus {name!r} is read again from step {step} of {last_step} on: it has {rows} rows, which the "
                    f"whole run reads {times:.1f} times. Prepare more data, or train for fewer steps"
                )
        return {f"data/epoch/{name}": counts[name] / max(1, rows) for name, rows in self._rows.items()}
