"""Foreign shards are indexed in one scan, read as they are, and refused if webdataset would lose something."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from rewurst import UsageError
from rewurst.datamodules.corpora.tar import scan
from rewurst.datamodules.corpora.tokens import TokenShards
from rewurst.datamodules.storage.random_access import open_bytes
from rewurst.preparation.index import index_shards
from rewurst.preparation.verify import verify

TOKENS = np.random.default_rng(0).integers(0, 500, size=(24, 9))


def write_rows(folder: Path, name: str, pieces: list[Any], mtime: float | None = None) -> Path:
    """Write a shard with webdataset's writer, with the current time in an extended header unless one is given."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    with wds.TarWriter(str(path), mtime=mtime) as writer:
        for number, rows in enumerate(pieces):
            writer.write({"__key__": f"{Path(name).stem}/{number:04d}", "npy": np.asarray(rows), "json": {"n": number}})
    return path


def index(folder: Path, *sources: Path, **options: Any) -> str:
    return index_shards([str(source) for source in sources or [folder]], progress=False, **options)


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
@pytest.mark.parametrize("rows", [1, 5, None], ids=["one row", "five rows", "flat"])
def test_rows_of_webdatasets_writer(tmp_path: Path, dtype: str, rows: int | None) -> None:
    tokens = TOKENS.astype(dtype)
    pieces = list(tokens) if rows is None else [tokens[i : i + rows] for i in range(0, 24, rows)]
    half = 12 if rows is None or rows == 1 else 3
    write_rows(tmp_path, "a-000000.tar", pieces[:half])
    write_rows(tmp_path, "a-000001.tar", pieces[half:])
    before = (tmp_path / "a-000000.tar").read_bytes()
    said = index(tmp_path)
    assert "24 rows of text in 2 shards" in said
    shards = TokenShards(tmp_path)
    np.testing.assert_array_equal(shards.read(np.arange(24)[::-1]), TOKENS[::-1])
    assert shards.index.vocab_size == TOKENS.max() + 1
    assert (shards.index.end_token, shards.index.tokenizer_sha256) == (None, "")
    assert verify(tmp_path) == []
    assert (tmp_path / "a-000000.tar").read_bytes() == before


def test_an_index_in_another_folder_contains_the_shards_places(tmp_path: Path) -> None:
    tar = write_rows(tmp_path / "shards", "a.tar", list(TOKENS))
    index(tmp_path, tar, out=tmp_path / "index")
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["a.tar"]
    np.testing.assert_array_equal(TokenShards(tmp_path / "index").read(np.array([7])), TOKENS[[7]])
    assert verify(tmp_path / "index") == []


def test_two_processes_index_as_one(tmp_path: Path) -> None:
    for number in range(3):
        write_rows(tmp_path, f"a-{number}.tar", list(TOKENS[number * 8 : number * 8 + 8]))
    index(tmp_path, out=tmp_path / "one")
    index(tmp_path, out=tmp_path / "two", workers=2)
    one, two = (json.loads((tmp_path / name / "index.json").read_text()) for name in ("one", "two"))
    assert one == two


def test_the_sidecar_steps_over_extended_headers(tmp_path: Path) -> None:
    """Float times and long names make tarfile write headers before headers."""
    tar = tmp_path / "pax.tar"
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as file:
        for number in range(3):
            content = io.BytesIO()
            np.save(content, TOKENS[number].astype(np.uint16))
            info = tarfile.TarInfo(f"{'long' * 40}{number}.npy")
            info.size, info.mtime = content.tell(), 1.5
            content.seek(0)
            file.addfile(info, content)
    index(tmp_path)
    np.testing.assert_array_equal(TokenShards(tmp_path).read(np.arange(3)), TOKENS[:3])


@settings(max_examples=25, deadline=None)
@given(
    names=st.lists(st.sampled_from(["a.npy", "a.txt", "b.cls", "b.seg.npy", "d/a.txt", "c.JSON"]), unique=True),
    sizes=st.lists(st.integers(0, 1500), min_size=6, max_size=6),
)
def test_a_scan_groups_as_webdataset_does(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], sizes: list[int]
) -> None:
    path = tmp_path_factory.mktemp("scan") / "x.tar"
    names = sorted(names)
    with tarfile.open(path, "w") as file:
        for name, size in zip(names, sizes, strict=False):
            info = tarfile.TarInfo(name)
            info.size = size
            file.addfile(info, io.BytesIO(bytes(size)))
    if not names:
        with pytest.raises(UsageError, match="contains no samples"):
            list(scan(open_bytes(str(path)), "x.tar"))
        return
    with path.open("rb") as stream:
        files = wds.tariterators.tar_file_iterator(stream)
        theirs = [
            {key: value for key, value in sample.items() if not key.startswith("__local")}
            for sample in wds.tariterators.group_by_keys({**file, "__url__": "x"} for file in files)
        ]
    content = open_bytes(str(path))
    ours = [
        {
            "__key__": sample.key,
            "__url__": "x",
            **{m.extension: bytes(content.read(m.begin, m.begin + m.size)) for m in sample.members},
        }
        for sample in scan(content, "x.tar")
    ]
    assert ours == theirs


def good_tar(folder: Path) -> Path:
    return write_rows(folder, "a.tar", list(TOKENS.astype(np.uint16)), mtime=0)


def cut(size: int) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def overwrite(position: int, content: bytes) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[position : position + len(content)] = content
        path.write_bytes(data)

    return apply


def append(*names: str, kind: bytes = tarfile.REGTYPE) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with tarfile.open(path, "a") as file:
            for name in names:
                info = tarfile.TarInfo(name)
                info.type = kind
                file.addfile(info)

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut(0), "a.tar: empty, expected a tar"),
        (cut(200), "a.tar: not a readable tar at byte 0"),
        (cut(2048 + 300), "a.tar: truncated in a header at byte 2048"),
        (cut(3072 + 600), "a.tar: truncated in 'a/0001.npy' at byte 3072: 58 bytes are missing"),
        (cut(2048 + 600), "a.tar: not a readable tar at byte 3072 (unexpected end of data)"),
        (cut(24 * 2048), "a.tar: ends at byte 49152 without the two zero blocks"),
        (cut(24 * 2048 + 600), "a.tar: ends at byte 49752 without the two zero blocks"),
        (overwrite(2048 + 148, b"99"), "a.tar: no readable header at byte 2048"),
        (append("a/0000.npy"), "a.tar: key 'a/0000' at byte "),
        (append("new.npy", "new.npy"), "a.tar: member 'new.npy' at byte "),
        (append("README"), "a.tar: member 'README' at byte "),
        (append("link.npy", kind=tarfile.SYMTYPE), "is not a regular file"),
        (append("z.npy"), "a.tar: sample 'z' at byte "),
        (append("z.txt"), "holds txt, expected one .npy"),
    ],
)
def test_a_shard_that_webdataset_would_lose_something_of(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    tar = good_tar(tmp_path)
    damage(tar)
    with pytest.raises(UsageError) as error:
        index(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "index.json").exists()


def test_rows_of_another_length_or_type(tmp_path: Path) -> None:
    write_rows(tmp_path / "one", "a.tar", [TOKENS[0], TOKENS[1][:5]])
    with pytest.raises(UsageError, match=r"a.tar: sample 'a/0001' at byte \d+ holds int64 rows of 5 tokens, the shard"):
        index(tmp_path / "one")
    write_rows(tmp_path / "two", "a.tar", [TOKENS[0]])
    write_rows(tmp_path / "two", "b.tar", [TOKENS[0].astype(np.uint16)])
    with pytest.raises(UsageError, match=r"b.tar holds uint16 rows of 9 tokens, a.tar int64 rows of 9"):
        index(tmp_path / "two")
    write_rows(tmp_path / "three", "a.tar", [TOKENS[:3], TOKENS[:2], TOKENS[:3]])
    with pytest.raises(UsageError, match=r"a.tar: its members hold 2 to 3 rows, expected 3"):
        index(tmp_path / "three")
    write_rows(tmp_path / "four", "a.tar", [TOKENS[0].astype(np.float32)])
    with pytest.raises(UsageError, match=r"holds <f4 of shape \(1, 9\), expected little-endian uint16"):
        index(tmp_path / "four")


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    trap = np.array([Trap(tmp_path / "sprung")], dtype=object)
    content = io.BytesIO()
    np.save(content, trap, allow_pickle=True)
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "0", "npy": content.getvalue(), "pyd": content.getvalue()})
    with pytest.raises(UsageError, match=r"sample '0' at byte 0: holds \|O of shape"):
        index(tmp_path)
    assert not (tmp_path / "sprung").exists()


class Trap:
    """Object that writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_tokens_outside_the_vocabulary(tmp_path: Path, tokenizer: Path) -> None:
    write_rows(tmp_path / "shards", "a.tar", [TOKENS[0], TOKENS[0] + 1000])
    with pytest.raises(UsageError, match=r"a.tar: token 1\d\d\d is outside the vocabulary of 2\d\d"):
        index(tmp_path / "shards", options={"tokenizer": str(tokenizer)})
    write_rows(tmp_path / "negative", "a.tar", [TOKENS[0] - 1000])
    with pytest.raises(UsageError, match=r"a.tar: token -\d+ is outside the vocabulary"):
        index(tmp_path / "negative")


def test_a_tokenizer_is_copied_and_compared(tmp_path: Path, tokenizer: Path) -> None:
    write_rows(tmp_path / "shards", "a.tar", list(TOKENS % 260))
    index(tmp_path / "shards", options={"tokenizer": str(tokenizer)})
    shards = TokenShards(tmp_path / "shards")
    assert 260 <= shards.index.vocab_size < 300
    assert shards.index.end_token is not None
    assert verify(tmp_path / "shards") == []
    (tmp_path / "shards" / "tokenizer" / "tokenizer.json").write_text("{}")
    assert "the tokens were made by another one" in verify(tmp_path / "shards")[0]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rewurst.preparation.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 50)
    train_tokenizer([str(folder / "text.txt")], 300, folder / "out")
    return folder / "out"


def test_a_token_changed_after_indexing_is_refused_with_its_place(tmp_path: Path) -> None:
    tar = good_tar(tmp_path)
    index(tmp_path)
    overwrite(3072 + 512 + 128 + 4, b"\xff\xff")(tar)
    with pytest.raises(UsageError, match=r"a.tar, member a/0001.npy, row 0 contains token 65535, but the vocab"):
        TokenShards(tmp_path).read(np.array([0, 1]))
    assert any("SHA-256" in line for line in verify(tmp_path))


def test_a_rewritten_tar_with_an_old_sidecar(tmp_path: Path) -> None:
    """It has the same size, so that only its headers differ."""
    tar = good_tar(tmp_path)
    index(tmp_path)
    size = tar.stat().st_size
    write_rows(tmp_path, "a.tar", [TOKENS.astype(np.uint16)])
    tar.write_bytes(tar.read_bytes().ljust(size, b"\0"))
    with pytest.raises(UsageError, match=r"a.tar: "):
        TokenShards(tmp_path).read(np.arange(24))
    assert verify(tmp_path)


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        (["nothing.tar"], {}, "nothing.tar: no such tar"),
        (["x.tar.gz"], {}, "x.tar.gz: only plain tars"),
        (["one/a.tar", "two/a.tar"], {}, "two shards are called a.tar"),
        (["one/a.tar", "two/b.tar"], {}, "are not in one local folder"),
        (["done"], {}, "has an index.json already; add --overwrite"),
        (["foreign"], {}, "c.idx exists and is not ours"),
        (["one"], {"caption_key": "x"}, "--caption_key does not go with shards of text"),
    ],
)
def test_wrong_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: list[str], options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one/a.tar", "two/a.tar", "two/b.tar", "done/d.tar", "foreign/c.tar"):
        write_rows(tmp_path / Path(name).parent, Path(name).name, list(TOKENS[:2]))
    (tmp_path / "x.tar.gz").touch()
    (tmp_path / "foreign" / "c.idx").write_text("v1.2 3")
    index(tmp_path / "done")
    with pytest.raises(UsageError) as error:
        index_shards(sources, progress=False, options=options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_neighboring_shards_that_share_a_key(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        with wds.TarWriter(str(tmp_path / name)) as writer:
            writer.write({"__key__": "same", "npy": TOKENS[0]})
    with pytest.raises(UsageError, match=r"b.tar begins with key 'same', with which a.tar ends"):
        index(tmp_path)


def test_ten_thousand_shards_open_without_touching_any(tmp_path: Path) -> None:
    good_tar(tmp_path)
    index(tmp_path)
    content = json.loads((tmp_path / "index.json").read_text())
    shard = content["shards"][0]
    content["shards"] = [{**shard, "name": f"{number:06d}.tar"} for number in range(10_000)]
    content.update(rows=240_000, tokens=240_000 * 8)
    (tmp_path / "index.json").write_text(json.dumps(content))
    assert len(TokenShards(tmp_path)) == 240_000
