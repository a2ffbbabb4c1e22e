"""Shards without an index, compressed shards and pipes, read from front to back by webdataset.

1. URLs are expanded and dealt out to ranks and workers by webdataset's own functions.
2. A shard is opened: a file (``.tar``, ``.tar.gz``, ``.tar.zst``), or the output of a command, where that is allowed.
3. webdataset reads the tar and groups its members by key; members stay bytes and nothing is decoded.

There is no position to return to: a run that resumes begins again with the first shard.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, cast

from torch.utils.data import IterableDataset
from webdataset import shardlists, tariterators, utils
from webdataset.gopen import gopen_pipe

from .. import UsageError
from .storage.random_access import is_remote
from .storage.zstd_files import open_zstd

Sample = dict[str, Any]


class SequentialShards(IterableDataset[Sample]):
    """Samples ``{"key": str, "members": {suffix: bytes}}`` of tars that have no index.

    Args:
        urls: Paths, with braces as webdataset expands them, or a list of paths that are taken as they are.
        allow_pipe: Whether ``pipe:COMMAND`` may run its command in a shell.

    Raises:
        UsageError: A pipe that is not allowed, or a URL of a server.
    """

    def __init__(self, urls: str | Sequence[str], allow_pipe: bool = False) -> None:
        self.urls = shardlists.expand_urls(urls) if isinstance(urls, str) else list(urls)
        for url in self.urls:
            if _is_pipe(url):
                if not allow_pipe:
                    raise UsageError(f"{url}: runs a command; allow_pipe=True lets it, if you trust its origin")
            elif is_remote(url):
                raise UsageError(f"{url}: index it to read it from a server, or give pipe:COMMAND with allow_pipe=True")
        warnings.warn(
            f"{len(self.urls)} shards are read in sequence: a run that resumes begins again with the first one; "
            "index them for an exact resume",
            stacklevel=2,
        )

    def __iter__(self) -> Iterator[Sample]:
        """This rank's and worker's samples.

        Raises:
            UsageError: Fewer shards than ranks, or one that cannot be read.
        """
        world_size = utils.pytorch_worker_info()[1]
        if len(self.urls) < world_size:
            raise UsageError(f"{len(self.urls)} shards for {world_size} ranks: each needs one of its own")
        for url in shardlists.split_by_worker(shardlists.split_by_node(self.urls)):
            yield from _samples(url)


def _samples(url: str) -> Iterator[Sample]:
    try:
        with _open(url) as stream:
            files = cast(Iterable[Any], tariterators.tar_file_expander([{"url": url, "stream": stream}]))
            for sample in tariterators.group_by_keys(files, lcase=False):
                members = {name: content for name, content in sample.items() if not name.startswith("__")}
                yield {"key": sample["__key__"], "members": members}
    except UsageError:
        raise
    except Exception as error:  # tarfile, gzip, zstd and webdataset have their own, and add the stream to them
        reason = error.strerror if isinstance(error, OSError) and error.strerror else (error.args or [""])[0]
        raise UsageError(f"{url}: cannot be read ({reason or type(error).__name__})") from None


def _open(url: str) -> IO[bytes]:
    if _is_pipe(url):
        return cast(IO[bytes], gopen_pipe(url))
    path = url.removeprefix("file://")
    return open_zstd(path) if url.endswith(".zst") else open(path, "rb")  # tarfile finds gzip, bzip2 and xz by itself


def _is_pipe(url: str) -> bool:
    return url.lower().startswith("pipe:")
