"""Preparation on a real Ray cluster of two workers gives the bytes of the local engine, even if processes die."""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from rewurst import UsageError
from rewurst.datamodules.storage import remote
from rewurst.modules.networks import SemanticCompressor
from rewurst.preparation.engine import image_units, text_units
from rewurst.preparation.engine import ray_tasks as engines
from rewurst.preparation.images import prepare_images
from rewurst.preparation.latents import prepare_latents
from rewurst.preparation.text import prepare_text, train_tokenizer
from rewurst.preparation.verify import verify
from rewurst.train import main

ray = pytest.importorskip("ray")
WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "fünf", "狗", "barked", "ran", "away"]
TEXT: dict[str, Any] = {"sequence_length": 16, "held_out": 0.2, "rows_per_shard": 256, "progress": False}


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """Start a bucket on loopback before the cluster, whose processes keep their initial environment."""
    import boto3
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": "http://{}:{}".format(*running.get_host_and_port()),
            "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true", "no_proxy": "127.0.0.1",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        patch.setattr(remote, "_file_systems", {})
        client = boto3.client("s3")
        client.create_bucket(Bucket="corpora")
        yield client
        client.close()
    running.stop()


@pytest.fixture(scope="module", autouse=True)
def cluster(bucket: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a Ray cluster and return its address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REWURST_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # by default workers wait for everything else on the machine
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # otherwise one is written into the home folder
        patch.setenv("RAY_AUTH_MODE", "")  # what Ray sets it to goes with the patch
        patch.delenv("RAY_AUTH_MODE")
        options = {"num_cpus": 2, "include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
        try:
            running = ray.init(**options)
        except Exception:  # on a machine that is busy beyond its cores Ray's half a minute may not do
            ray.shutdown()
            running = ray.init(**options)
        yield running.address_info["address"]
        ray.shutdown()


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_units, "RUN_BYTES", 1000)
    monkeypatch.setattr(image_units, "UNIT_PICTURES", 5)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def objects(bucket: Any, prefix: str) -> dict[str, bytes]:
    found = bucket.list_objects_v2(Bucket="corpora", Prefix=f"{prefix}/")["Contents"]
    return {
        one["Key"].removeprefix(f"{prefix}/"): bucket.get_object(Bucket="corpora", Key=one["Key"])["Body"].read()
        for one in found
    }


def document(i: int) -> str:
    return f"{i}: {' '.join(np.random.default_rng(i).choice(WORDS, size=5 + i % 60))}.\n"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Write files of many documents and of one, of few and of many characters, and an empty one."""
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    for number in range(6):
        lines = [json.dumps({"text": document(100 * number + i)}) + "\n" for i in range(60 if number % 2 else 3)]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    (folder / "b" / "long.txt").write_text("".join(map(document, range(1000, 1100))))
    (folder / "b" / "none.txt").write_text("")
    return folder


@pytest.fixture
def tokenizer(texts: Path, tmp_path: Path) -> str:
    train_tokenizer([str(texts)], 300, tmp_path / "tokenizer", progress=False)
    return str(tmp_path / "tokenizer")


class Fifo:
    """File of which a worker reads half and then waits, so that the process within a unit is known."""

    def __init__(self, path: Path) -> None:
        self.path, self.content = path, path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        self.inode = path.stat().st_ino

    def reader(self) -> int:
        """Return the process that has begun to read the file."""
        while True:
            self.end = self.path.open("wb")  # waits for a reader, which may yet be one that is about to end
            with contextlib.suppress(BrokenPipeError):
                self.end.write(self.content[: len(self.content) // 2])
                self.end.flush()
                others = (process for process in psutil.process_iter() if process.pid != os.getpid())
                if (found := next(filter(self._is_open, others), None)) is not None:
                    return found.pid
            self.close()

    def restore(self) -> None:
        """Restore the file."""
        (self.path.parent.parent / "restored").write_bytes(self.content)
        os.replace(self.path.parent.parent / "restored", self.path)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.end.close()

    def kill_reader(self) -> threading.Thread:
        """Kill the process that reads the file once it has begun; later readers find the file."""
        killed = threading.Thread(target=self._kill, daemon=True)
        killed.start()
        return killed

    def _kill(self) -> None:
        pid = self.reader()
        self.restore()
        os.kill(pid, signal.SIGKILL)
        self.close()

    def _is_open(self, process: psutil.Process) -> bool:
        with contextlib.suppress(OSError):
            return any(os.stat(file).st_ino == self.inode for file in Path(f"/proc/{process.pid}/fd").iterdir())
        return False


def test_text_equals_the_local_engines_although_a_worker_is_killed(
    texts: Path, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = Fifo(texts / "3.jsonl").kill_reader()
    indices = prepare_text([str(texts)], tokenizer, tmp_path / "ray", engine="ray", **TEXT)
    killed.join()
    assert "1 empty documents skipped" in capsys.readouterr().err
    assert prepare_text([str(texts)], tokenizer, tmp_path / "local", **TEXT) == indices
    expected = contents(tmp_path / "local")
    assert {"train/texts-000001.tar", "val/texts-000000.tar"} <= set(expected)
    assert contents(tmp_path / "ray") == expected


def test_a_killed_preparation_resumes(
    cluster: str, texts: Path, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that distributes units is killed during one of them; finished units are kept."""
    out = tmp_path / "ray"
    script = (
        "import sys; from rewurst.preparation.engine import text_units; from rewurst.preparation import text\n"
        "text_units.RUN_BYTES = 1000\n"
        f"text.prepare_text([sys.argv[1]], sys.argv[2], sys.argv[3], engine='ray', workers=1, **{TEXT!r})\n"
    )
    fifo = Fifo(texts / "4.jsonl")
    command = [sys.executable, "-c", script, str(texts), tokenizer, str(out)]
    with subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": cluster}) as driver:
        fifo.reader()
        driver.kill()
    fifo.restore()
    fifo.close()
    records = {path: path.stat().st_mtime_ns for path in (out / ".preparing" / "tokens").glob("*.json")}
    assert len(records) == 4, "one at a time, the fifth was in work"
    assert not list(out.glob("*/index.json"))
    with pytest.raises(UsageError, match=r"was started with sequence_length 16, not 8: give the same value to resume"):
        prepare_text([str(texts)], tokenizer, out, engine="ray", **{**TEXT, "sequence_length": 8})
    remove, seen = text_units.Target.remove, dict[Path, int]()

    def removing(self: text_units.Target, folder: str = "") -> None:
        if not seen:
            seen.update({path: path.stat().st_mtime_ns for path in records})
        remove(self, folder)

    monkeypatch.setattr(text_units.Target, "remove", removing)
    prepare_text([str(texts)], tokenizer, out, engine="ray", **TEXT)
    assert seen == records, "they were not done again"
    prepare_text([str(texts)], tokenizer, tmp_path / "local", **TEXT)
    assert contents(out) == contents(tmp_path / "local")


def test_a_source_that_has_changed_is_refused(texts: Path, tokenizer: str, tmp_path: Path) -> None:
    (texts / "5.jsonl").write_text("{")
    asked: dict[str, Any] = {"engine": "ray", "workers": 1, "max_corrupt": 0.0, **TEXT}
    with pytest.raises(UsageError, match=r"5\.jsonl:1"):
        prepare_text([str(texts)], tokenizer, tmp_path / "out", **asked)
    (texts / "0.jsonl").write_text(json.dumps({"text": "other"}))
    with pytest.raises(UsageError, match="the source of tokens 000000 has changed since it was prepared"):
        prepare_text([str(texts)], tokenizer, tmp_path / "out", **asked)
    (texts / "5.jsonl").unlink()
    prepare_text([str(texts)], tokenizer, tmp_path / "out", overwrite=True, **asked)
    assert verify(tmp_path / "out" / "train") == []
    with pytest.raises(UsageError, match="is not empty; choose another folder or add --overwrite"):
        prepare_text([str(texts)], tokenizer, tmp_path / "out", **asked)


def test_text_from_and_to_object_storage(bucket: Any, texts: Path, tokenizer: str, tmp_path: Path) -> None:
    for path in texts.rglob("*.*"):
        bucket.upload_file(str(path), "corpora", f"texts/{path.relative_to(texts)}")
    asked: dict[str, Any] = {**TEXT, "held_out": 0.0}
    command = ["prepare", "text", "s3://corpora/texts", "--tokenizer", tokenizer, "--out", "s3://corpora/out/text"]
    assert main([*command, "--engine", "ray", "--sequence_length", "16", "--rows_per_shard", "256"]) == 0
    prepare_text(["s3://corpora/texts"], tokenizer, tmp_path / "local", **asked)
    expected = contents(tmp_path / "local")
    assert objects(bucket, "out/text") == expected
    prepare_text([str(texts)], tokenizer, tmp_path / "disk", **asked)
    tars = [name for name in expected if name.endswith(".tar")]
    assert {name: contents(tmp_path / "disk")[name] for name in tars} == {name: expected[name] for name in tars}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Write captioned pictures, among them corrupt ones and one without a caption."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(23):
        pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 40, 3)).astype(np.uint8)
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "png")
        cut = -100 if number in (6, 13) else None
        (folder / f"{number:02d}.png").write_bytes(content.getvalue()[:cut])
        if number != 9:
            (folder / f"{number:02d}.txt").write_text(f"number {number}")
    return folder


PICTURES: dict[str, Any] = {"held_out": 0.3, "max_corrupt": 0.5, "samples_per_shard": 4, "progress": False}


def test_pictures_equal_the_local_engines_although_a_worker_is_killed(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=r"09\.png: no caption; add one, or leave such pictures out"):
        prepare_images(str(pictures), tmp_path / "ray", engine="ray", workers=1, **PICTURES)
    killed = Fifo(pictures / "17.png").kill_reader()
    asked = {**PICTURES, "skip_without_caption": True}
    counts = prepare_images(str(pictures), tmp_path / "ray", engine="ray", **asked)
    killed.join()
    said = capsys.readouterr().err.replace(str(tmp_path / "ray"), "")
    assert prepare_images(str(pictures), tmp_path / "local", **asked) == counts
    assert capsys.readouterr().err.replace(str(tmp_path / "local"), "") == said
    assert "2 corrupt pictures left out" in said
    expected = contents(tmp_path / "local")
    assert {"train/pictures-000001.tar", "val/pictures-000001.tar"} <= set(expected)
    assert contents(tmp_path / "ray") == expected


def test_pictures_from_and_to_object_storage(
    bucket: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards are cut by bytes here."""
    for path in pictures.iterdir():
        bucket.upload_file(str(path), "corpora", f"pictures/{path.name}")
    monkeypatch.setattr("rewurst.preparation.writing.image_writer.SHARD_BYTES", 12_000)
    asked = {**PICTURES, "skip_without_caption": True, "samples_per_shard": None}
    command = ["prepare", "images", "s3://corpora/pictures", "--out", "s3://corpora/out/pictures", "--engine", "ray"]
    assert main([*command, "--held_out", "0.3", "--max_corrupt", "0.5", "--skip_without_caption"]) == 0
    prepare_images("s3://corpora/pictures", tmp_path / "local", **asked)
    expected = contents(tmp_path / "local")
    assert "train/pictures-000002.tar" in expected
    assert objects(bucket, "out/pictures") == expected


def dies(job: None, unit: int) -> int:
    """Unit whose process always dies."""
    if unit == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return unit


def test_a_unit_whose_process_is_always_lost_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "RETRIES", 1)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with (
        pytest.raises(UsageError, match=r"unit 2: its process was lost 2 times, perhaps for want of memory \("),
        engines.Ray(most=2) as running,
    ):
        list(running.run(dies, None, ((f"unit {i}", i) for i in range(4))))
    assert ray.is_initialized(), "a cluster that was there stays"


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="workers is 0, expected 1 or more with engine ray"):
        engines.Ray(most=0)
    with pytest.raises(UsageError, match="device cuda: the Ray cluster has no GPU"), engines.Ray(gpus=1):
        pass
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UsageError, match=r"ray_address ray://127\.0\.0\.1:1: no Ray cluster there \(.*refused"):
        engines.Ray("ray://127.0.0.1:1").__enter__()


def kill_at_work(function: str, out: Path, done: threading.Event) -> None:
    """Kill a process within a unit, once another unit and the imports are done."""
    while not done.wait(0.02):
        at_work = (process for process in psutil.process_iter() if title(process).startswith(f"ray::{function}"))
        if any(out.glob("*.idx")) and (process := next(at_work, None)) is not None:
            process.kill()
            return


def title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return "".join(process.cmdline()[:1])
    return ""


def test_latents_equal_the_local_engines_although_a_worker_is_killed(bucket: Any, tmp_path: Path) -> None:
    prepare_images("builtin:shapes", tmp_path / "shapes", pictures=1, progress=False)
    torch.manual_seed(1)
    SemanticCompressor.from_preset("tiny", widths=[8, 16, 16], c_latent=4).save(tmp_path / "compressor")
    source, compressor = str(tmp_path / "shapes" / "val"), str(tmp_path / "compressor")
    asked: dict[str, Any] = {"samples_per_shard": 60, "batch_size": 4, "progress": False}
    done = threading.Event()
    killing = threading.Thread(target=kill_at_work, args=("_do", tmp_path / "ray", done), daemon=True)
    killing.start()
    command = ["prepare", "latents", source, "--stage_b", compressor, "--image_size", "32", "--engine", "ray"]
    assert main([*command, "--samples_per_shard", "60", "--batch_size", "4", "--out", str(tmp_path / "ray")]) == 0
    assert not killing.is_alive(), "a process was killed meanwhile"
    done.set()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as a unit on a cluster has: sums depend on it in their last bits
    prepare_latents(source, tmp_path / "local", compressor, 32, **asked)
    prepare_latents(source, "s3://corpora/out/latents", compressor, 32, **asked)
    torch.set_num_threads(threads)
    expected = contents(tmp_path / "local")
    assert "latents-000003.tar" in expected
    assert contents(tmp_path / "ray") == expected
    assert objects(bucket, "out/latents") == expected
