"""Read files compressed with Zstandard."""

from __future__ import annotations

import sys
from typing import IO, Any, cast

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

WINDOW_LOG = 31  # windows of up to 2 GiB, as `zstd --long=31` writes; memory is taken only if a frame asks for it
ZstdError: type[Exception] = zstd.ZstdError


def open_zstd(file: IO[bytes] | str) -> IO[bytes]:
    """Open a file for reading decompressed: all frames in order, without skippable ones.

    Closing it also closes the file if it was given by its path. Reading raises ``EOFError`` at a truncated frame and
    ``ZstdError`` at a damaged one.
    """
    options: Any = {zstd.DecompressionParameter.window_log_max: WINDOW_LOG}
    return cast(IO[bytes], zstd.ZstdFile(file, options=options))
