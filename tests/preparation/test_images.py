"""Pictures are prepared to the same tars by any number of workers; faults are counted and bounded."""

import io
import itertools
import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prepared_images import FORMATS, content, files, picture, prepare, samples, write_table

from rewurst.datamodules.corpora.index import Shard
from rewurst.datamodules.imaging.facts import FACTS_DTYPE
from rewurst.preparation.engine import image_units
from rewurst.preparation.sources.pictures import shapes
from rewurst.preparation.steps.recoding import Recoding
from rewurst.preparation.verify import verify
from rewurst.train import main as run


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


def test_held_out_pictures_follow_from_their_files(folder: Path, tmp_path: Path) -> None:
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


def test_images_inside_a_parquet_file(tmp_path: Path) -> None:
    """As stored by the Image feature of the datasets library."""
    rows = [{"image": {"bytes": content(i), "path": None}, "caption": f"words {i}"} for i in range(3)]
    write_table(tmp_path / "a.parquet", rows)
    prepare(tmp_path / "a.parquet", tmp_path / "out")
    assert [(s["jpg"], s["txt"]) for s in samples(tmp_path / "out/train")] == [
        (content(i), f"words {i}".encode()) for i in range(3)
    ]


def test_json_next_to_a_picture_is_kept(folder: Path, tmp_path: Path) -> None:
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
