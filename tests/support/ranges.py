"""Class that spawned processes import by name: other packages install folders named ``tests`` over ours."""

from __future__ import annotations

from torch.utils.data import Dataset

from rewurst.datamodules.storage import random_access as storage


class Ranges(Dataset[bytes]):
    """Pieces of one object."""

    def __init__(self, opened: storage.Bytes) -> None:
        self.opened = opened

    def __len__(self) -> int:
        return 50

    def __getitem__(self, number: int) -> bytes:
        return bytes(self.opened.read(number * 200, number * 200 + 200))
