"""Preparation of pictures: the same tars whoever works on them; webdataset reads them; faults are counted, bounded."""

import errno
import io
import itertools
import json
import os
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image

from rewurst import UsageError
from rewurst.datamodules.corpora.index import Shard
from rewurst.datamodules.imaging.facts import FACTS_DTYPE
from rewurst.preparation.engine import image_units
from rewurst.preparation.images import prepare_images
from rewurst.preparation.sources import shapes
from rewurst.preparation.sources.pictures import Picture
from rewurst.preparation.steps.recoding import Fault, Recoding, sample_of
from rewurst.preparation.verify import verify
from rewurst.preparation.writing import shard_file
from rewurst.preparation.writing.image_writer import Sample
from rewurst.train import main as run

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")


def picture(number: int, width: int = 40, height: int = 30) -> Image.Image:
    small = np.random.default_rng(number).integers(256, size=(3, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def content(number: int, kind: str = "JPEG", width: int = 40, height: int = 30) -> bytes:
    file = io.BytesIO()
    picture(number, width, height).save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pictures in folders, three of each format, with captions."""
    root = tmp_path / "my pictures.d"
    for number in range(12):
        kind = FORMATS[number % 4]
        path = root / f"part{number // 6}" / f"{number:02d}.{kind.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(number, kind))
        path.with_suffix(".txt").write_text(f" picture {number}\n")
    return root


def prepare(source: Path | str, out: Path, **options: Any) -> dict[str, int]:
    return prepare_images(str(source), out, progress=False, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def samples(folder: Path) -> list[dict[str, Any]]:
    """As webdataset reads them, from files that are closed again."""
    found: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as stream:
            members = wds.tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
            found += wds.tariterators.group_by_keys(members)
    return found


def test_a_folder_becomes_shards_that_webdataset_reads(folder: Path, tmp_path: Path) -> None:
    assert prepare(folder, tmp_path / "out") == {"train": 12}
    found = samples(tmp_path / "out/train")
    assert [sample["__key__"] for sample in found] == [f"{number:09d}" for number in range(12)]
    for number, sample in enumerate(found):
        kind = FORMATS[number % 4]
        assert sample["txt"] == f"picture {number}".encode()
        assert sample[{"JPEG": "jpg"}.get(kind, kind.lower())] == content(number, kind)  # byte by byte


def test_index_offsets_and_facts_say_what_is_in_the_tars(folder: Path, tmp_path: Path) -> None:
    prepare(folder, tmp_path / "out", samples_per_shard=5)
    train = tmp_path / "out/train"
    index = json.loads((train / "index.json").read_text())
    assert (index["version"], index["kind"], index["rows"], index["sources"]) == (1, "images", 12, [str(folder)])
    shards = [Shard(**shard) for shard in index["shards"]]
    assert [(shard.name, shard.samples, shard.rows) for shard in shards] == [
        ("my_pictures-000000.tar", 5, 5),
        ("my_pictures-000001.tar", 5, 5),
        ("my_pictures-000002.tar", 2, 2),
    ]
    for shard in shards:
        assert (train / shard.name).stat().st_size == shard.bytes
        with tarfile.open(train / shard.name) as tar:
            members = tar.getmembers()
            end = tar.offset
        assert {(member.mtime, member.uid, member.uname, member.mode) for member in members} == {(0, 0, "", 0o644)}
        firsts = [members[0], *(b for a, b in itertools.pairwise(members) if a.name[:9] != b.name[:9])]
        offsets = np.fromfile(train / shard.idx_name, dtype="<u8")
        assert offsets.tolist() == [*(member.offset for member in firsts), end]
    facts = np.load(train / "facts.npy", allow_pickle=False)
    assert (facts.dtype, facts.shape) == (FACTS_DTYPE, (sum(shard.samples for shard in shards),))
    assert set(facts["width"]) == {40}
    assert set(facts["height"]) == {30}
    assert set(facts["caption_length"]) <= {9, 10}
    assert verify(train) == []


def test_the_number_of_workers_changes_no_byte(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_units, "UNIT_PICTURES", 2)
    recoding = Recoding(image_size=16, format="webp")
    for workers in (0, 2):
        prepare(folder, tmp_path / str(workers), workers=workers, held_out=0.4, recoding=recoding)
    assert files(tmp_path / "0") == files(tmp_path / "2")
    assert {name.split("/")[0] for name in files(tmp_path / "0")} == {"train", "val"}


def test_held_out_pictures_are_those_whose_files_say_so(folder: Path, tmp_path: Path) -> None:
    for number in range(12):  # every picture comes twice
        image = next(path for path in folder.rglob(f"{number:02d}.*") if path.suffix != ".txt")
        shutil.copy(image, folder / f"copy{number}{image.suffix}")
        (folder / f"copy{number}.txt").write_text("a copy")
    counts = prepare(folder, tmp_path / "out", held_out=0.4)
    assert sum(counts.values()) == 24
    sides = [
        {
            sample[key]
            for sample in samples(tmp_path / "out" / side)
            for key in sample
            if key in ("jpg", "png", "gif", "webp")
        }
        for side in counts
    ]
    assert not sides[0] & sides[1]
    assert [2 * len(side) for side in sides] == list(counts.values())


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
@pytest.mark.parametrize("inside", [True, False])
def test_tables_name_files_and_captions(folder: Path, tmp_path: Path, kind: str, inside: bool) -> None:
    """As Hugging Face's imagefolder: metadata.jsonl in the folder, or the table itself is the source."""
    rows = [
        {"file_name": path.relative_to(folder).as_posix(), "text": f"words {i}", "pwatermark": 0.5, "tags": ["a"]}
        for i, path in enumerate(sorted(p for p in folder.rglob("*.*") if p.is_file() and p.suffix != ".txt"))
    ]
    table = folder / f"metadata{kind}"
    write_table(table, rows)
    prepare(folder if inside else table, tmp_path / "out")
    found = samples(tmp_path / "out/train")
    assert [sample["txt"].decode() for sample in found] == [f"words {i}" for i in range(12)]
    assert json.loads(found[3]["json"]) == {"file_name": rows[3]["file_name"], "pwatermark": 0.5}
    facts = np.load(tmp_path / "out/train" / "facts.npy")
    assert facts["watermark"].tolist() == [0.5] * 12


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_images_inside_a_parquet_file(tmp_path: Path) -> None:
    """As the datasets library stores its Image feature."""
    rows = [{"image": {"bytes": content(i), "path": None}, "caption": f"words {i}"} for i in range(3)]
    write_table(tmp_path / "a.parquet", rows)
    prepare(tmp_path / "a.parquet", tmp_path / "out")
    assert [(s["jpg"], s["txt"]) for s in samples(tmp_path / "out/train")] == [
        (content(i), f"words {i}".encode()) for i in range(3)
    ]


def test_json_beside_a_picture_is_kept(folder: Path, tmp_path: Path) -> None:
    (folder / "part0/00.json").write_text('{"aesthetic": 6.5, "caption": "more"}')
    prepare(folder, tmp_path / "out")
    found = samples(tmp_path / "out/train")
    assert json.loads(found[0]["json"]) == {"aesthetic": 6.5, "caption": "more"}
    assert "json" not in found[1]
    assert np.load(tmp_path / "out/train" / "facts.npy")["aesthetic"][0] == 6.5


@pytest.mark.parametrize(("chosen", "suffix"), [(None, "jpg"), ("jpg", "jpg"), ("png", "png"), ("webp", "webp")])
def test_pictures_are_made_smaller_and_encoded_again(
    tmp_path: Path,
    chosen: str | None,
    suffix: str,
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number, (width, height) in enumerate([(400, 300), (40, 30)]):
        (folder / f"{number}.jpg").write_bytes(content(number, "JPEG", width, height))
        (folder / f"{number}.txt").write_text("a caption")
    prepare(folder, tmp_path / "out", recoding=Recoding(image_size=75, format=chosen))
    large, small = samples(tmp_path / "out/train")
    with Image.open(io.BytesIO(large[suffix])) as image:
        assert image.size == (100, 75)
        expected = np.asarray(picture(0, 400, 300).resize((100, 75), Image.Resampling.BICUBIC)).astype(float)
        assert np.abs(np.asarray(image.convert("RGB")) - expected).mean() < 3
    assert json.loads(large["json"]) == {"original_height": 300, "original_width": 400}
    with Image.open(io.BytesIO(small[suffix])) as image:
        assert image.size == (40, 30)
    assert "json" not in small
    if chosen in (None, "jpg"):
        assert small["jpg"] == content(1)
    facts = np.load(tmp_path / "out/train" / "facts.npy")
    assert facts["original_width"].tolist() == [400, 0]


def test_drawn_shapes(tmp_path: Path) -> None:
    assert prepare("builtin:shapes", tmp_path / "out", pictures=1, recoding=Recoding(image_size=32)) == {
        "train": 864,
        "val": 864,
        "unseen": 96,
    }
    sides = {side: samples(tmp_path / "out" / side) for side in ("train", "val", "unseen")}
    captions = {side: Counter(sample["txt"].decode() for sample in found) for side, found in sides.items()}
    assert captions["train"] == captions["val"]
    assert set(captions["unseen"]) == {shapes.caption(shape) for shape in shapes.held_out()}
    assert not set(captions["unseen"]) & set(captions["train"])
    pictures = {side: {sample["png"] for sample in found} for side, found in sides.items()}
    assert not pictures["train"] & pictures["val"]  # fresh ones
    drawn_shapes = [shapes.Shape(**json.loads(sample["json"])) for sample in sides["unseen"]]
    assert drawn_shapes != shapes.held_out()  # in mixed order
    assert sorted(drawn_shapes) == sorted(shapes.held_out())
    judge = shapes.Judge(32)
    drawn = np.stack([np.asarray(Image.open(io.BytesIO(sample["png"]))) for sample in sides["unseen"]])
    read = judge.read(drawn)
    assert np.mean([shape == expected for shape, expected in zip(read, drawn_shapes, strict=True)]) > 0.9


def test_other_seeds_draw_other_pictures(tmp_path: Path) -> None:
    recoding = Recoding(image_size=16)
    for seed in (0, 1):
        prepare("builtin:shapes-new", tmp_path / str(seed), pictures=1, seed=seed, recoding=recoding)
    drawn = [{sample["png"] for sample in samples(tmp_path / str(seed) / "unseen")} for seed in (0, 1)]
    assert not drawn[0] & drawn[1]
    assert (tmp_path / "0/train/shapes_new-000000.tar").exists()


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
        UsageError, match=r"none of its 12 images has a caption, expected a \.txt beside each, such as .*part0/00\.txt"
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
def test_wrong_use_makes_nothing(
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

    def sample(picture: Picture, recoding: Recoding) -> Sample | Fault:
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


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run(
        [
            "prepare",
            "images",
            str(folder),
            "--out",
            str(out),
            "--image_size",
            "16",
            "--format",
            "png",
            "--quality",
            "80",
        ]
    )
    shown = capsys.readouterr().err
    assert "images" in shown
    assert f"{out}/train: 12 pictures in 1 shards" in shown
    assert {key for sample in samples(out / "train") for key in sample if not key.startswith("__")} == {
        "png",
        "txt",
        "json",
    }
