"""Tars of pictures from the wild: nothing is lost or merged silently."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rewurst import UsageError
from rewurst.datamodules.corpora.images import ImageIndex, ImageShards
from rewurst.preparation.index import index_shards
from rewurst.preparation.sources.documents import Skipped, SourceFile, read
from rewurst.preparation.verify import verify
from rewurst.train import main


def png(number: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), number, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def tar(path: Path, members: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def index(path: Path, **options: object) -> str:
    return index_shards([str(path)], progress=False, options=options)


@pytest.mark.parametrize(
    "members",
    [
        {"v1.jpg": png(), "v1.txt": "a", "v1.5_cat.jpg": png(), "v1.5_cat.txt": "b"},
        {"v1.5_cat.jpg": png(), "v1.5_cat.txt": "a", "v1.6_dog.jpg": png(), "v1.6_dog.txt": "b"},
        {"v1.5_cat.jpg": png(), "v1.5_cat.txt": "a"},
        {"a.jpg": png(), "a.png": png(), "a.txt": "a"},
        {"0.png": png(), "0.txt": "a", "d.x/1.input.PNG": png(), "d.x/1.txt": "b"},
    ],
)
def test_pictures_that_would_merge_into_one_sample_are_refused(members: dict[str, bytes | str], tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", members)
    with pytest.raises(UsageError, match=r"a\.tar: webdataset makes one sample '.*' of \..*--image_member") as error:
        index_shards([str(tmp_path)], kind="images", progress=False)
    assert "\n" not in str(error.value)


def test_members_are_named_by_options(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {}
    for i in range(3):
        members |= {f"{i}.input.jpg": png(i), f"{i}.output.jpg": png(9), f"{i}.output.txt": f"words {i}"}
    path = tar(tmp_path / "a.tar", members)
    asked = ["--image_member", ".Input.jpg", "--caption_member", "*.output.txt"]
    assert main(["prepare", "index", str(path), *asked]) == 0
    shards = ImageShards(tmp_path)
    assert (shards.index.image_member, shards.index.caption_member) == ("input.jpg", "output.txt")
    for i in range(3):
        found = shards.members(i)
        assert (shards.index.image(found), shards.index.captions(found)) == (png(i), [f"words {i}"])
    assert verify(tmp_path) == []
    with pytest.raises(UsageError, match=r"no sample has a caption \(\.edit\.txt\), they have \.input\.jpg"):
        index_shards(
            [str(path)],
            overwrite=True,
            progress=False,
            options={"image_member": "input.jpg", "caption_member": "edit.txt"},
        )


def test_a_caption_may_be_in_a_named_json(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {"0.jpg": png(), "0.meta.json": json.dumps({"texts": ["one", "two"]})})
    index(tmp_path, caption_key="texts", caption_member="meta.json")
    shards = ImageShards(tmp_path)
    assert shards.index.captions(shards.members(0)) == ["one", "two"]


def test_an_index_without_named_members_is_as_before(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {"0.jpg": png(), "0.txt": "a"})
    index(tmp_path)
    assert set(json.loads((tmp_path / "index.json").read_text())) == {
        *("shards", "rows", "sources", "version", "kind", "facts_sha256", "caption_key")
    }
    fields = {"shards": (), "rows": 0, "sources": (), "facts_sha256": "0"}
    assert ImageIndex(**fields).fingerprint() != ImageIndex(**fields, image_member="a.jpg").fingerprint()
    assert ImageIndex(**fields).fingerprint() == "28d626763aa984640a3c37366ee64abe36ecf36902ca2e6669209d661280e823"


CLUTTER = [".DS_Store", "._0.jpg", "a/._1.txt", "a/.hidden.jpg", "__MACOSX/._1.jpg", "Thumbs.db", "a/desktop.ini"]


def test_files_of_file_managers_are_left_out_and_counted(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {"a/0.jpg": png(0), ".DS_Store": "x", "a/0.txt": "zero"}
    members |= {name: png(7) for name in CLUTTER[1:]} | {"__notes__": "{}"}
    members |= {"a/1.jpg": png(1), "a/._1.jpg": png(7), "a/1.txt": "one"}
    tar(tmp_path / "a.tar", members)
    said = index(tmp_path)
    assert "2 rows of images" in said
    assert "; 8 files that belong to no sample left out (the first: .DS_Store)" in said
    shards = ImageShards(tmp_path)
    for row, caption in enumerate(("zero", "one")):
        assert set(shards.members(row)) == {"jpg", "txt"}
        assert shards.index.image(shards.members(row)) == png(row)
        assert shards.index.captions(shards.members(row)) == [caption]
    assert verify(tmp_path) == []


def test_an_unsorted_tar_is_refused_with_the_command_that_sorts_it(tmp_path: Path) -> None:
    names = ["0.jpg", "1.jpg", "0.txt", "1.txt"]
    tar(tmp_path / "a.tar", {name: png() for name in names})
    with pytest.raises(UsageError, match=r"key '0' at byte \d+ occurs again: .*`tar --sort=name`"):
        index(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for name in ("0.jpg", "1.jpg", "0.jpg"):
            file.addfile(tarfile.TarInfo(name))
    with pytest.raises(UsageError, match=r"key '0' at byte \d+ occurs again; rename one of the samples"):
        index(tmp_path)


FOREIGN = {"cp1252": "café", "gbk": "中文", "shift_jis": "日本", "utf-16-le": "plain", "iso2022_jp": "日本"}


@pytest.mark.parametrize("encoding", FOREIGN)
def test_captions_of_other_encodings_are_counted_or_refused(encoding: str, tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {}
    for i in range(4):
        members |= {f"{i}.png": png(i), f"{i}.txt": FOREIGN[encoding].encode(encoding) if i == 2 else "words"}
    path = tar(tmp_path / "a.tar", members)
    with pytest.raises(UsageError, match=r"1 of 4 images are corrupt, .* a\.tar|1 of 4 images are corrupt"):
        index(tmp_path)
    said = index(tmp_path, max_corrupt=0.5)
    assert "1 unreadable, which are left out: " in said
    assert "a.tar, 2: .txt: " in said
    with pytest.raises(UsageError, match=r"a\.tar: 2\.txt: .*convert it to UTF-8"):
        list(read(SourceFile(str(path), ".tar"), "text", Skipped()))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_honored(encoding: str, tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"0.png": png(), "0.txt": "naïve 東京".encode(encoding)})
    index(tmp_path)
    shards = ImageShards(tmp_path)
    assert shards.index.captions(shards.members(0)) == ["naïve 東京"]
    assert [piece.text for piece in read(SourceFile(str(path), ".tar"), "text", Skipped())] == ["naïve 東京"]


def test_a_source_of_text_counts_what_it_leaves_out(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {".DS_Store": "x", "0.txt": "a", "0.5_b.txt": "b", "._0.txt": "x"})
    skipped = Skipped()
    assert [piece.text for piece in read(SourceFile(str(path), ".tar"), "text", skipped)] == ["a", "b"]
    assert skipped.report() == "2 files of tars that belong to no sample skipped"


def test_a_sample_split_over_two_tars_is_not_to_be_renamed(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {"0.jpg": png(), "0.txt": "a", "1.jpg": png()})
    tar(tmp_path / "b.tar", {"1.txt": "b"})
    with pytest.raises(UsageError, match=r"b\.tar begins with key '1', .* write the shards again, each"):
        index_shards([str(tmp_path)], progress=False, options={"max_corrupt": 1.0})
