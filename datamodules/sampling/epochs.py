"""Count the passes over each corpus, and warn when new data is read again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch.utilities import rank_zero_warn


class CorpusEpochs:
    """Counter of passes over corpora that warns once for each new corpus when its second pass begins.

    Args:
        rows: Number of rows by corpus; for a replayed corpus, the rows of its first reading.
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
            last_step: Global batches of the dataset in the whole run; 0 if the run's length is given in epochs, where
                repeated data is expected.
        """
        for name in [*self._fresh]:
            rows = self._rows[name]
            if last_step and counts[name] > rows:
                self._fresh.remove(name)
                times = counts[name] * last_step / step / rows
                rank_zero_warn(
                    f"corpus {name!r} is read again from step {step} of {last_step} on: the whole run reads its {rows} "
                    f"rows {times:.1f} times. Prepare more data, or train for fewer steps"
                )
        return {f"data/epoch/{name}": counts[name] / max(1, rows) for name, rows in self._rows.items()}
