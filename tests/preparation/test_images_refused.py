"""Preparation of corrupt or missing pictures, existing folders, and invalid commands."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from prepared_images import content, files, prepare, samples, write_table

from rewurst import UsageError
from rewurst.preparation.engine import image_units
from rewurst.preparation.sources.pictures import Picture
from rewurst.preparation.steps.recoding import Fault, Recoding, sample_of
from rewurst.preparation.verify import verify
from rewurst.preparation.writing import shard_file
from rewurst.preparation.writing.image_writer import ImageSample


def test_corrupt_pictures_are_counted_and_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "part0/00.jpeg").write_bytes(content(0)[:-100])
    (folder / "part0/01.png").write_bytes(b"<html>")
    (folder / "notes.md").write_text("left out")
    assert prepare(folder, tmp_path / "out", max_corrupt=0.2) == {"train": 10}
    shown = capsys.readouterr().err
    assert f"{tmp_path}/out/train: 10 pictures in 1 shards" in shown
    assert f"2 corrupt pictures left out, the first: {folder}/part0/00.jpeg (jpeg: " in shown
    assert "01.png (not a JPEG, PNG, WebP or GIF (begins with 3c 68 74 6d))" in shown
    assert f"1 other files left out (the first: {folder}/notes.md)" in shown
    assert len(samples(tmp_path / "out/train")) == 10


def test_too_many_corrupt_pictures(folder: Path, tmp_path: Path) -> None:
    (folder / "part0/00.jpeg").write_bytes(b"")
    with pytest.raises(
        UsageError,
        match=r"1 of 12 images are corrupt, more than max_corrupt 0\.05 allows; the first is .*00\.jpeg \(.*empty",
    ):
        prepare(folder, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".preparing"}
    for path in folder.rglob("*.*"):
        if path.suffix != ".txt" and path.is_file():
            path.write_bytes(b"broken")
    with pytest.raises(UsageError, match="12 of 12 images are corrupt"):
        prepare(folder, tmp_path / "out", workers=2, overwrite=True)
    with pytest.raises(UsageError, match="out/train: no picture is left for it"):
        prepare(folder, tmp_path / "out", max_corrupt=1)


def test_a_bomb_is_a_corrupt_picture() -> None:
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (50_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    fault = sample_of(Picture("bomb.png", header, "a bomb", {}), Recoding(image_size=64))
    assert fault == Fault("corrupt", "bomb.png", "50000 x 50000 pixels are more than 134217728")


def test_pictures_without_a_caption(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "part0/03.txt").unlink()
    (folder / "part0/04.txt").write_text(" \n")
    with pytest.raises(UsageError, match=r"part0/03\.gif: no caption; add one, or .*--skip_without_caption"):
        prepare(folder, tmp_path / "out")
    assert prepare(folder, tmp_path / "out", skip_without_caption=True) == {"train": 10}
    assert f"2 pictures without a caption left out, the first: {folder}/part0/03.gif" in capsys.readouterr().err
    for path in folder.rglob("*.txt"):
        path.unlink()
    with pytest.raises(
        UsageError, match=r"none of its 12 images has a caption, expected a \.txt next to each, such as .*part0/00\.txt"
    ):
        prepare(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"file": "a.png", "text": "a"}],
            {},
            r"a\.jsonl:1: no field 'file_name' or 'image' or 'path'; --image_field can be one of: file, text",
        ),
        (
            [{"file_name": "a.png", "words": "a"}],
            {},
            r"no field 'text' or 'caption'; --caption_field can be one of: file_name, words",
        ),
        (
            [{"file_name": "a.png"}],
            {"caption_field": "body"},
            r"no field 'body'; --caption_field can be one of: file_name",
        ),
        ([{"file_name": 3, "text": "a"}], {}, r"a\.jsonl:1: file_name holds 3, expected a file name"),
        ([{"file_name": "a.png", "text": 3}], {}, r"a\.jsonl:1: text holds 3, expected text"),
        ([{"file_name": "a.png", "text": None}], {}, r"a\.jsonl:1: no caption; add one"),
        (
            [{"file_name": "a.png", "text": "a"}],
            {},
            r"1 of 1 images are corrupt, .*a\.png cannot be read \(No such file",
        ),
        ([], {}, r"source .*a\.jsonl: it has no rows"),
    ],
)
def test_tables_that_do_not_fit(
    tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any], message: str
) -> None:
    write_table(tmp_path / "a.jsonl", rows)
    with pytest.raises(UsageError, match=message) as error:
        prepare(tmp_path / "a.jsonl", tmp_path / "out", **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("none", {}, "source none: no such file or folder"),
        ("builtin:shape", {}, "no such built-in pictures, expected .* did you mean builtin:shapes?"),
        ("builtin:shapes", {"held_out": 0.1}, "held_out is 0.1, expected none for builtin:shapes"),
        ("builtin:shapes", {"pictures": 0}, "pictures is 0, expected 1 or more"),
        ("builtin:shapes", {"recoding": Recoding(8)}, "image_size is 8, expected 16 or more"),
        (__file__, {}, r"unknown kind '\.py', expected a folder of images, a \.jsonl or \.parquet"),
        (".", {"held_out": 1.0}, "held_out is 1.0, expected a share of the pictures from 0 to below 1"),
        (".", {"workers": -1}, "workers is -1, expected 0 or more"),
        (".", {"max_corrupt": 2}, "max_corrupt is 2, expected a share of the pictures from 0 to 1"),
        (".", {"samples_per_shard": 0}, "samples_per_shard is 0, expected 1 or more"),
    ],
)
def test_wrong_use_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        prepare(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size is 0, expected 1 or more"),
        ({"format": "bmp"}, "format is 'bmp', expected jpg or png or webp"),
        ({"quality": 101}, "quality is 101, expected 1 to 100"),
    ],
)
def test_wrong_recodings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recoding(**arguments)


def test_a_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("a")
    with pytest.raises(UsageError, match=r"the folder has no image \(\.jpg, \.jpeg, \.png, \.webp, \.gif\)"):
        prepare(tmp_path / "in", tmp_path / "out")


def test_a_full_disk_is_one_line_and_the_same_call_resumes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(shard_file._HashingFile):
        def write(self, data: bytes) -> int:
            if self._file.closed:
                return 0
            with shard_file.writing(self._path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shard_file, "_HashingFile", Full)
    with pytest.raises(UsageError, match=r"000000-train\.tar: cannot be written \(No space left on device\)"):
        prepare(folder, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("index.json"))
    monkeypatch.undo()
    prepare(folder, tmp_path / "out")
    assert verify(tmp_path / "out") == []


def test_an_interrupted_preparation_leaves_no_index_and_resumes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(folder, tmp_path / "undisturbed", samples_per_shard=2)
    monkeypatch.setattr(image_units, "UNIT_PICTURES", 3)
    original, seen = image_units.sample_of, list[str]()

    def sample(picture: Picture, recoding: Recoding) -> ImageSample | Fault:
        seen.append(picture.name)
        if len(seen) == 8:
            raise KeyboardInterrupt
        return original(picture, recoding)

    monkeypatch.setattr(image_units, "sample_of", sample)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, tmp_path / "out", samples_per_shard=2)
    assert not list((tmp_path / "out").rglob("index.json"))
    prepare(folder, tmp_path / "out", samples_per_shard=2)
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")
    assert seen[8:10] == seen[6:8], "the first two units were not done again"
    assert len(seen) == 8 + 6


def test_only_prepared_folders_are_overwritten(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(folder, out, held_out=0.4)
    with pytest.raises(UsageError, match="out is not empty; choose another folder or add --overwrite"):
        prepare(folder, out)
    prepare(folder, out, overwrite=True)
    assert {path.name for path in out.iterdir()} == {"train"}
    (out / "train/thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"out has train/thesis\.tex, which preparation does not make"):
        prepare(folder, out, overwrite=True)
