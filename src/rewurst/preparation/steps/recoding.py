"""What is done to one picture on its way into a shard: read, checked, made smaller if asked for, its facts settled.

It is done in worker processes, many pictures a task, and depends on nothing but the picture and the options.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import multiprocessing
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ... import UsageError
from ...datamodules.imaging.decoding import decode, read_header
from ...datamodules.imaging.facts import facts_of
from ...datamodules.imaging.geometry import Crop, resample, size_to_decode
from ...datamodules.imaging.header import MAX_PIXELS, DecodeError
from ...datamodules.storage.url import Place, Url
from ..sources.pictures import Drawing, Picture
from ..sources.shapes import draw
from ..writing.image_writer import Sample

FORMATS = ("jpg", "png", "webp")
TASK_PICTURES = 32
TASKS_PER_WORKER = 2
_SUFFIXES = {"jpeg": "jpg"}  # of formats, where it is another word


@dataclass(frozen=True)
class Recoding:
    """How pictures are stored.

    Args:
        image_size: Shortest side in pixels; pictures with a longer one are made smaller, none larger.
        format: ``jpg``, ``png`` or ``webp``. By default files stay as they are, byte by byte, and those that are made
            smaller keep their format (GIF becomes PNG).
        quality: Of JPEG and WebP, 1 to 100.
        max_pixels: Larger pictures count as corrupt.
    """

    image_size: int | None = None
    format: str | None = None
    quality: int = 95
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise UsageError(f"image_size is {self.image_size}, expected 1 or more")
        if self.format not in (None, *FORMATS):
            raise UsageError(f"format is {self.format!r}, expected {' or '.join(FORMATS)}")
        if not 1 <= self.quality <= 100:
            raise UsageError(f"quality is {self.quality}, expected 1 to 100")


class Fault(NamedTuple):
    """A picture that cannot be used; ``kind`` is ``corrupt`` or ``caption``."""

    kind: str
    name: str
    reason: str


def work(pictures: Iterable[Picture], recoding: Recoding, workers: int) -> Iterator[Sample | Fault]:
    """Samples of ``pictures`` in their order, the same for any number of ``workers``.

    Args:
        pictures: Read only as far as ``TASKS_PER_WORKER`` tasks a worker ahead of what has been returned.
        recoding: How they are stored.
        workers: Processes; with 0 or 1 the work is done in this one.

    Raises:
        UsageError: A worker died, as it does when the system runs out of memory.
    """
    if workers <= 1:
        for picture in pictures:
            yield sample_of(picture, recoding)
        return
    # Spawned, not forked: the parent may hold threads of torch, which do not survive a fork.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _ignore_interrupts)
    pending: deque[Future[list[Sample | Fault]]] = deque()
    listed = iter(pictures)
    try:
        while task := list(itertools.islice(listed, TASK_PICTURES)):
            pending.append(pool.submit(_work_on, task, recoding))
            if len(pending) >= workers * TASKS_PER_WORKER:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        raise UsageError(
            f"a process that prepares pictures died, perhaps for want of memory; try --workers below {workers}"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def sample_of(picture: Picture, recoding: Recoding) -> Sample | Fault:
    """The sample that a picture becomes, or why it becomes none."""
    try:
        caption = _caption(picture.caption)
        if caption is None:
            return Fault("caption", picture.name, "no caption")
        values = _values(picture.values)
        if isinstance(picture.image, Drawing):
            drawing = picture.image
            suffix = recoding.format or "png"
            data = _encode(draw(*drawing), suffix, recoding.quality)
            decides = data
        else:
            decides = picture.image if isinstance(picture.image, bytes) else _read(picture.image)
            suffix, data, original = _recode(decides, recoding)
            if original is not None:
                values = {"original_width": original[1], "original_height": original[0]} | values
        members = {suffix: data, "txt": caption.encode()}
        if values:
            members["json"] = json.dumps(values, sort_keys=True, ensure_ascii=False).encode("utf-8", "replace")
        share = int.from_bytes(hashlib.blake2b(decides, digest_size=8).digest(), "big") / 2**64
        return Sample(members, facts_of(members, max_pixels=recoding.max_pixels), share, picture.side)
    except DecodeError as error:
        return Fault("corrupt", picture.name, str(error))


def side_of(sample: Sample, held_out: float) -> str:
    """Where a sample goes: as its source says, or ``val`` for a share of ``held_out`` and ``train`` for the others."""
    return sample.side or ("val" if sample.draw < held_out else "train")


def _recode(data: bytes, recoding: Recoding) -> tuple[str, bytes, tuple[int, int] | None]:
    """Suffix and content of what is stored, and the size before where that was larger."""
    header = read_header(data, recoding.max_pixels)
    size = header.height, header.width
    suffix = _SUFFIXES.get(header.format, header.format)
    smaller = recoding.image_size is not None and min(size) > recoding.image_size
    if not smaller and recoding.format in (None, suffix):
        decode(data, (1, 1), recoding.max_pixels)  # reads all of it, and says whether it is whole
        return suffix, data, None
    target = _target(size, recoding.image_size) if smaller else size
    whole = Crop(0, 0, *size)
    pixels = decode(data, size_to_decode(size, whole, target), recoding.max_pixels)
    suffix = recoding.format or {"gif": "png"}.get(suffix, suffix)
    return suffix, _encode(resample(pixels, size, whole, target), suffix, recoding.quality), size if smaller else None


def _target(size: tuple[int, int], shortest: int | None) -> tuple[int, int]:
    assert shortest is not None
    by = shortest / min(size)
    return max(shortest, round(size[0] * by)), max(shortest, round(size[1] * by))


def _encode(pixels: NDArray[np.uint8], suffix: str, quality: int) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    if suffix == "jpg":
        image.save(file, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2)
    elif suffix == "webp":
        image.save(file, "WEBP", quality=quality)
    else:
        image.save(file, "PNG", compress_level=6)
    return file.getvalue()


def _caption(caption: Place | str | None) -> str | None:
    if isinstance(caption, Path | Url):
        caption = _read(caption).decode("utf-8-sig", "replace")
    if caption is not None:
        caption = caption.encode("utf-8", "replace").decode().strip()  # JSON can spell half a surrogate pair
    return caption or None


def _values(values: Place | dict[str, Any]) -> dict[str, Any]:
    if isinstance(values, dict):
        return values
    try:
        found = json.loads(_read(values))
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"{values} is not valid JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(found, dict):
        raise DecodeError(f"{values} holds a {type(found).__name__}, expected an object")
    return found


def _read(path: Place) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DecodeError(f"{path} cannot be read ({error.strerror or error})") from None


def _work_on(task: Sequence[Picture], recoding: Recoding) -> list[Sample | Fault]:
    return [sample_of(picture, recoding) for picture in task]


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


LISTED = 3  # faults that the summary names
ENOUGH = 1000  # pictures after which too many faults end the preparation early


class Faults:
    """Pictures that could not be used: counted, the first of each kind remembered.

    Args:
        max_corrupt: Share that may be corrupt.
        skip_without_caption: Whether pictures without a caption are left out rather than refused.
    """

    def __init__(self, max_corrupt: float, skip_without_caption: bool) -> None:
        self._max_corrupt, self._skip = max_corrupt, skip_without_caption
        self._seen = 0
        self._counts = {"corrupt": 0, "caption": 0}
        self._first: dict[str, list[Fault]] = {"corrupt": [], "caption": []}

    def count(self, seen: int, found: Sequence[Fault]) -> None:
        """Take note of pictures, and of those among them that cannot be used.

        Raises:
            UsageError: One has no caption, or too many are corrupt.
        """
        self._seen += seen
        for fault in found:
            if fault.kind == "caption" and not self._skip:
                raise without_caption(fault)
            self._counts[fault.kind] += 1
            if len(self._first[fault.kind]) < LISTED:
                self._first[fault.kind].append(fault)
        if any(fault.kind == "corrupt" for fault in found):
            self.check()

    def check(self, final: bool = False) -> None:
        """Raise where more are corrupt than may be; before the end only once that is sure enough."""
        corrupt = self._counts["corrupt"]
        if corrupt > self._max_corrupt * self._seen and (final or self._seen >= ENOUGH):
            raise UsageError(
                f"{corrupt} of {self._seen} pictures are corrupt, more than max_corrupt ({self._max_corrupt}) of them; "
                f"the first: {_named(self._first['corrupt'][:1])}"
            )

    def remarks(self) -> Iterator[str]:
        """One line for each kind of fault that there was."""
        for kind, what in (("corrupt", "corrupt pictures"), ("caption", "pictures without a caption")):
            if self._counts[kind]:
                yield f"{self._counts[kind]} {what} left out, the first: {_named(self._first[kind])}"


def _named(faults: Sequence[Fault]) -> str:
    return "; ".join(f"{fault.name} ({fault.reason})" for fault in faults)


def without_caption(fault: Fault) -> UsageError:
    """That a picture needs a caption."""
    return UsageError(f"{fault.name}: no caption; add one, or leave such pictures out: --skip_without_caption")
