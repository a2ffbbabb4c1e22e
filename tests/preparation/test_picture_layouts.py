"""Folders and tables of pictures from other tools: every layout of the table in docs/data.md."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rewurst import UsageError
from rewurst.datamodules.corpora.images import ImageShards
from rewurst.datamodules.imaging.decoding import decode
from rewurst.preparation.engine import image_units
from rewurst.preparation.images import prepare_images
from rewurst.preparation.sources.pictures.listing import Picture
from rewurst.train import main

CAPTIONS = ["a river", "a stone, wet", "naïve 東京"]
Rows = list[dict[str, Any]]


def encoded(number: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def parquet(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def csv_file(path: Path, rows: Rows, encoding: str = "utf-8", delimiter: str = ",") -> Path:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return put(path, text.getvalue().encode(encoding))


def hub_rows(*numbers: int) -> Rows:
    return [{"image": {"bytes": encoded(i), "path": f"{i}.png"}, "text": CAPTIONS[i]} for i in numbers]


def with_texts(root: Path, suffix: str, kind: str = "PNG", image: str = ".png") -> Path:
    for i, caption in enumerate(CAPTIONS):
        put(root / f"{i}{image}", encoded(i, kind))
        put(root / f"{i}{suffix}", json.dumps({"caption": caption}) if suffix == ".json" else caption)
    return root


def named_rows(root: Path, *numbers: int, below: str = "", separator: str = "/") -> Rows:
    for i in numbers:
        put(root / "files" / below / f"{i}.png", encoded(i))
    return [{"file_name": separator.join(["files", *below.split(), f"{i}.png"]), "text": CAPTIONS[i]} for i in numbers]


def with_table(name: str, write: Callable[[Path, Rows], Path]) -> Callable[[Path], Path]:
    def build(root: Path) -> Path:
        write(root / name, named_rows(root, 0, 1, 2))
        return root

    return build


def json_lines(path: Path, rows: Rows) -> Path:
    return put(path, "".join(json.dumps(row) + "\n" for row in rows))


def lists(root: Path) -> Path:
    for i, caption in enumerate(CAPTIONS):
        put(root / f"{i}.png", encoded(i))
        put(root / f"{i}.json", json.dumps([caption]))
    return root


def windows(root: Path) -> Path:
    json_lines(root / "metadata.jsonl", named_rows(root, 0, 1, 2, separator="\\"))
    return root


def splits(root: Path) -> Path:
    for name, numbers in (("train", (0, 1)), ("validation", (2,))):
        json_lines(root / name / "metadata.jsonl", named_rows(root / name, *numbers))
    return root


def split_folders(root: Path) -> Path:
    for name, number in (("train", 0), ("train", 1), ("test", 2)):
        put(root / name / f"{number}.png", encoded(number))
        put(root / name / f"{number}.txt", CAPTIONS[number])
    return root


def hub(root: Path) -> Path:
    parquet(root / "data" / "train-00000-of-00002.parquet", hub_rows(0))
    parquet(root / "data" / "train-00001-of-00002.parquet", hub_rows(1))
    parquet(root / "data" / "test-00000-of-00001.parquet", hub_rows(2))
    put(root / "README.md", "a dataset")
    return root


def img2dataset_files(root: Path) -> Path:
    for i, caption in enumerate(CAPTIONS):
        put(root / "00000" / f"00000000{i}.jpg", encoded(i, "JPEG"))
        put(root / "00000" / f"00000000{i}.txt", caption)
        put(root / "00000" / f"00000000{i}.json", json.dumps({"caption": caption, "url": "http://", "width": 30}))
    parquet(root / "00000.parquet", [{"url": "http://", "caption": "not read"}])
    put(root / "00000_stats.json", "{}")
    return root


def img2dataset_parquet(root: Path) -> Path:
    rows = [{"key": str(i), "jpg": encoded(i, "JPEG"), "caption": caption} for i, caption in enumerate(CAPTIONS)]
    return parquet(root / "00000.parquet", rows)


def one_trainer(root: Path) -> Path:
    for i in range(3):
        put(root / f"{i}-masklabel.png", encoded(9))
    return with_texts(root, ".txt")


def after_the_suffix(root: Path) -> Path:
    for i, caption in enumerate(CAPTIONS):
        put(root / f"{i}.png", encoded(i))
        put(root / f"{i}.png.json", json.dumps({"text": caption}))
    return root


def in_capitals(root: Path) -> Path:
    for i, caption in enumerate(CAPTIONS):
        put(root / f"{i}.PNG", encoded(i))
        put(root / f"{i}.TXT", caption)
    return root


def two_configurations(root: Path) -> Path:
    for name in ("de", "en"):
        parquet(root / name / "train-00000-of-00001.parquet", hub_rows(0))
    return root


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "text files": lambda root: with_texts(root, ".txt"),
    "kohya": lambda root: with_texts(root, ".caption"),
    "OneTrainer": one_trainer,
    "after the suffix": after_the_suffix,
    "in capitals": in_capitals,
    "json only": lambda root: with_texts(root, ".json"),
    "lists of captions": lists,
    "metadata.jsonl": with_table("metadata.jsonl", json_lines),
    "metadata.csv": with_table("metadata.csv", csv_file),
    "metadata.csv of Excel": with_table("metadata.csv", lambda path, rows: csv_file(path, rows, "utf-8-sig")),
    "metadata.csv in UTF-16": with_table("metadata.csv", lambda path, rows: csv_file(path, rows, "utf-16")),
    "metadata.parquet": with_table("metadata.parquet", parquet),
    "tab separated": lambda root: csv_file(root / "a.tsv", named_rows(root, 0, 1, 2), delimiter="\t"),
    "backslashes": windows,
    "splits with tables": splits,
    "splits with text files": split_folders,
    "hub": hub,
    "hub file": lambda root: parquet(root / "0000.parquet", hub_rows(0, 1, 2)),
    "img2dataset files": img2dataset_files,
    "img2dataset parquet": img2dataset_parquet,
    "jfif": lambda root: with_texts(root, ".txt", "JPEG", ".jfif"),
    "bmp": lambda root: with_texts(root, ".txt", "BMP", ".bmp"),
    "tiff": lambda root: with_texts(root, ".txt", "TIFF", ".TIF"),
    "avif": lambda root: with_texts(root, ".txt", "AVIF", ".avif"),
}
SIDES = {"splits with tables": ("train", "val"), "splits with text files": ("train", "test"), "hub": ("train", "test")}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_other_tools(name: str, tmp_path: Path) -> None:
    source, out = LAYOUTS[name](tmp_path / "in"), tmp_path / "out"
    sides = SIDES.get(name, ("train",))
    counts = prepare_images([str(source)], out, progress=False)
    assert counts == ({"train": 3} if len(sides) == 1 else {"train": 2, sides[1]: 1})
    found = {}
    for side in sides:
        shards = ImageShards(out / side)
        for row in range(len(shards)):
            members = shards.members(row)
            [caption] = shards.index.captions(members)
            found[caption] = shards.index.image(members)
    assert sorted(found) == sorted(CAPTIONS)
    for number, caption in enumerate(CAPTIONS):
        jpeg = name in ("jfif", "img2dataset files", "img2dataset parquet")
        kind = "JPEG" if jpeg else name.upper() if name in ("bmp", "tiff", "avif") else "PNG"
        np.testing.assert_array_equal(decode(found[caption]), decode(encoded(number, kind)))


def test_several_sources_in_one_command(tmp_path: Path) -> None:
    first, second = with_texts(tmp_path / "first", ".txt"), LAYOUTS["hub file"](tmp_path / "second")
    out = tmp_path / "out"
    assert main(["prepare", "images", str(first), str(second), "--out", str(out), "--held_out", "0.4"]) == 0
    assert sum(len(ImageShards(out / side)) for side in ("train", "val")) == 6
    assert ImageShards(out / "train").index.sources == (str(first), str(second))


def test_a_source_with_splits_next_to_one_without(tmp_path: Path) -> None:
    sources = [str(splits(tmp_path / "first")), str(with_texts(tmp_path / "second", ".txt"))]
    assert prepare_images(sources, tmp_path / "out", progress=False) == {"train": 5, "val": 1}
    with pytest.raises(UsageError, match=r"held_out is 0\.1, expected none for .*: it has held-out pictures itself"):
        prepare_images(sources, tmp_path / "other", held_out=0.1, progress=False)


def test_a_caption_field_goes_before_text_files(tmp_path: Path) -> None:
    with_texts(tmp_path / "in", ".txt")
    for i in range(3):
        put(tmp_path / "in" / f"{i}.json", json.dumps({"long": f"long {i}", "tags": ["one", "two"]}))
    for field, expected in (("long", ["long 0"]), ("tags", ["one", "two"])):
        out = tmp_path / field
        prepare_images([str(tmp_path / "in")], out, caption_field=field, progress=False)
        shards = ImageShards(out / "train")
        assert shards.index.captions(shards.members(0)) == expected


def test_several_captions_are_all_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"image": {"bytes": encoded(i)}, "text": texts} for i, texts in enumerate((["a\nb", " c "], "d\ne"))]
    json_lines(tmp_path / "no.jsonl", [{"file_name": "a.png", "text": ["a", 3]}])
    put(tmp_path / "in" / "0.png", encoded(3))
    put(tmp_path / "in" / "0.txt", "f\r\n\r\n g\n")
    json_lines(tmp_path / "in.jsonl", [{"file_name": "in/0.png", "text": rows[0]["text"]}])
    json_lines(tmp_path / "one.jsonl", [{"file_name": "in/0.png", "text": rows[1]["text"]}])
    sources = [str(tmp_path / name) for name in ("in", "in.jsonl", "one.jsonl")]
    prepare_images(sources, tmp_path / "out", progress=False)
    shards = ImageShards(tmp_path / "out" / "train")
    assert [shards.index.captions(shards.members(row)) for row in range(3)] == [["f", "g"], ["a b", "c"], ["d e"]]
    assert shards.facts["caption_length"].tolist() == [1, 1, 3]
    assert "2 pictures have several captions, of which training draws one each time" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"no\.jsonl:1: text holds \['a', 3\], expected text or a list of texts"):
        prepare_images([str(tmp_path / "no.jsonl")], tmp_path / "other", progress=False)


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "two tables": (
        lambda root: (with_table("metadata.csv", csv_file)(root), with_table("metadata.jsonl", json_lines)(root))[0],
        r"it has metadata\.csv and metadata\.jsonl; name the one to read",
    ),
    "a part is missing": (
        lambda root: parquet(root / "data" / "train-00001-of-00003.parquet", hub_rows(0)).parents[1],
        "data: it has 1 of the 3 files of train; get the others",
    ),
    "an unknown split": (
        lambda root: parquet(root / "train_sft-00000-of-00001.parquet", hub_rows(0)).parent,
        "split 'train_sft' is unknown, expected one of train",
    ),
    "a field that is not there": (
        lambda root: put(with_texts(root, ".json") / "0.json", '{"title": "a", "n": 1}').parent,
        r"0\.json: no field 'text' or 'caption'; --caption_field can be one of: title",
    ),
    "a broken csv": (
        lambda root: put(root / "a.csv", "file_name,text\na.png,a, b\n"),
        r"a\.csv:2: 3 fields, expected 2 as in the first line; put texts with commas in double quotes",
    ),
    "a csv of another encoding": (
        lambda root: put(root / "a.csv", "file_name,text\na.png,caf\xe9\n".encode("latin-1")),
        r"a\.csv: byte 24 \(0xe9\) is not valid UTF-8; convert it to UTF-8",
    ),
    "two configurations": (
        two_configurations,
        "it has tables in the folders de, en; name the one to read, or several",
    ),
    "phones": (lambda root: put(root / "0.heic", b"").parent, "convert its HEIC files to JPEG"),
    "tars": (lambda root: put(root / "0.tar", b"").parent, "its tars are for rewurst prepare index"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_ambiguous_layouts_are_refused(name: str, tmp_path: Path) -> None:
    build, message = REFUSED[name]
    with pytest.raises(UsageError, match=message) as error:
        prepare_images([str(build(tmp_path / "in"))], tmp_path / "out", progress=False)
    assert "\n" not in str(error.value)


def test_img2dataset_rows_without_a_picture_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"jpg": encoded(0, "JPEG"), "caption": "a"}, {"jpg": None, "caption": "b"}]
    prepare_images([str(parquet(tmp_path / "0.parquet", rows))], tmp_path / "out", max_corrupt=0.5, progress=False)
    assert "1 corrupt pictures left out, the first: " in capsys.readouterr().err


def test_values_of_a_table_that_change_are_noticed_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row | {"aesthetic": 5.0} for row in named_rows(tmp_path, 0, 1, 2)]
    source = json_lines(tmp_path / "metadata.jsonl", rows)
    monkeypatch.setattr(image_units, "UNIT_PICTURES", 1)
    original, seen = image_units.sample_of, list[str]()

    def sample(picture: Picture, recoding: Any) -> Any:
        seen.append(picture.name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return original(picture, recoding)

    monkeypatch.setattr(image_units, "sample_of", sample)
    with pytest.raises(KeyboardInterrupt):
        prepare_images([str(source)], tmp_path / "out", progress=False)
    json_lines(source, [rows[0] | {"aesthetic": 1.0}, *rows[1:]])
    with pytest.raises(UsageError, match="the source of pictures 000000 has changed since it was prepared"):
        prepare_images([str(source)], tmp_path / "out", progress=False)


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le with mark", "utf-16-be with mark", "utf-32"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_byte_order_marks_of_captions_are_honored(encoding: str, tmp_path: Path) -> None:
    name, _, mark = encoding.partition(" with ")
    put(tmp_path / "in" / "0.png", encoded(0))
    put(tmp_path / "in" / "0.txt", (("\ufeff" if mark else "") + CAPTIONS[2]).encode(name))
    prepare_images([str(tmp_path / "in")], tmp_path / "out", progress=False)
    shards = ImageShards(tmp_path / "out" / "train")
    assert shards.index.captions(shards.members(0)) == [CAPTIONS[2]]


FOREIGN = {
    "cp1252": "café",
    "gbk": "中文",
    "shift_jis": "日本",
    "utf-16-le": "plain",
    "utf-16-be": "plain",
    "iso2022_jp": "日本",
}


@pytest.mark.parametrize("encoding", FOREIGN)
def test_captions_of_other_encodings_are_counted_and_named(
    encoding: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_texts(tmp_path / "in", ".txt")
    put(tmp_path / "in" / "1.txt", FOREIGN[encoding].encode(encoding))
    with pytest.raises(UsageError, match=r"1 of 3 images are corrupt, .*1\.png \(\S+1\.txt: .*convert it to UTF-8\)"):
        prepare_images([str(tmp_path / "in")], tmp_path / "out", progress=False)
    assert prepare_images([str(tmp_path / "in")], tmp_path / "out", max_corrupt=0.4, progress=False) == {"train": 2}
    assert "1 corrupt pictures left out, the first: " in capsys.readouterr().err


def test_half_a_surrogate_pair_is_not_a_caption(tmp_path: Path) -> None:
    put(tmp_path / "a.png", encoded(0))
    put(tmp_path / "a.jsonl", '{"file_name": "a.png", "text": "half \\ud83d"}\n')
    with pytest.raises(UsageError, match="has half a surrogate pair"):
        prepare_images([str(tmp_path / "a.jsonl")], tmp_path / "out", progress=False)


def test_the_docs_list_every_layout() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf8")
    table = text.partition("## Pictures as other tools write them")[2].partition("\n## ")[0]
    for word in (
        *(".txt", ".caption", ".json", "metadata.jsonl", "metadata.csv", "metadata.parquet", "backslashes", ".tsv"),
        *("train/", "train-00000-of-00002.parquet", "img2dataset", "kohya", "OneTrainer", "the hub", "imagefolder"),
        *(".jfif", "BMP", "TIFF", "AVIF", "UTF-8", "prepare index"),
    ):
        assert word in table, word


def test_images_outside_of_folders_with_tables_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = splits(tmp_path / "in")
    put(source / "more" / "0.png", encoded(0))
    prepare_images([str(source)], tmp_path / "out", progress=False)
    assert f"1 images in folders without a table left out (the first: {source}/more/0.png)" in capsys.readouterr().err
