"""Damaged checkpoints are refused in one line, or passed over, and never load as other weights."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rewurst import UsageError
from rewurst.checkpoints import checksums
from rewurst.checkpoints.atomic import AtomicCheckpointIO
from rewurst.checkpoints.newest import newest_checkpoint
from rewurst.modules.networks.weight_files import read_file

MUTATIONS = 200


def flip(content: bytearray, draw: random.Random) -> None:
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)


def zero_sector(content: bytearray, draw: random.Random) -> None:
    begin = draw.randrange(len(content)) // 512 * 512
    content[begin : begin + 512] = bytes(len(content[begin : begin + 512]))


def swap(content: bytearray, draw: random.Random) -> None:
    a, b = (draw.randrange(len(content) - 64) for _ in range(2))
    content[a : a + 64], content[b : b + 64] = content[b : b + 64], content[a : a + 64]


def cut(content: bytearray, draw: random.Random) -> None:
    del content[draw.randrange(len(content)) :]


def insert(content: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(content))
    content[at:at] = draw.randbytes(draw.randint(1, 64))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "step=2.ckpt"
    state = {f"layer.{number}": torch.randn(40, 30) for number in range(6)}
    content = {"state_dict": state, "global_step": 2, "optimizer_states": [{"state": {0: torch.randn(500)}}]}
    AtomicCheckpointIO().save_checkpoint(content, path)
    return path


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("mutate", [flip, zero_sector, swap, cut, insert], ids=lambda each: each.__name__)
def test_a_damaged_file_is_one_line_or_loads_as_it_was(
    mutate: Callable[[bytearray, random.Random], None], checkpoint: Path, tmp_path: Path
) -> None:
    whole, content = read_file(checkpoint), checkpoint.read_bytes()
    draw = random.Random(mutate.__name__)
    refused = 0
    for number in range(MUTATIONS // 5):
        damaged = bytearray(content)
        mutate(damaged, draw)
        path = tmp_path / f"{number}.ckpt"
        path.write_bytes(damaged)
        for read in (read_file, AtomicCheckpointIO().load_checkpoint):
            try:
                found = read(path)
            except UsageError as error:
                refused += "\n" not in str(error)
            else:
                assert same(whole, found), number
    assert refused > MUTATIONS // 5


def test_auto_takes_the_checkpoint_before_a_damaged_one(
    checkpoint: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    newer = tmp_path / "step=4.ckpt"
    content = dict(read_file(checkpoint)) | {"global_step": 4}
    AtomicCheckpointIO().save_checkpoint(content, newer)
    assert newest_checkpoint([tmp_path]) == newer
    damaged = bytearray(newer.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newer.write_bytes(damaged)
    assert newest_checkpoint([tmp_path]) == checkpoint
    assert any("does not match its checksum" in str(warning.message) for warning in recwarn)


def test_a_file_is_checked_once_and_not_at_all_if_asked(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Path] = []
    look = checksums.damaged_member
    monkeypatch.setattr(checksums, "damaged_member", lambda path: looked.append(path) or look(path))
    copy = shutil.copy(checkpoint, tmp_path / "copy.ckpt")
    for _ in range(3):
        read_file(copy)
    assert looked == [copy]
    damaged = bytearray(checkpoint.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    Path(copy).write_bytes(damaged)
    with pytest.raises(UsageError, match="is damaged"):
        read_file(copy)
    monkeypatch.setenv("REWURST_SKIP_CHECKSUMS", "1")
    read_file(copy)
