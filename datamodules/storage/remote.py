"""Read remote objects in ranges: http and https with the standard library, everything else with fsspec.

fsspec's http client keeps an event loop in a thread, which forked DataLoader workers do not have, and it hides status
and headers. ``urllib`` has neither problem: each request opens a connection, and with blocks of 4 MiB the handshake is
short compared to the transfer. For s3 and gs, fsspec provides signing and credentials; each process makes its own file
systems.

Temporary failures (statuses 408, 425, 429 and 5xx, time-outs, broken connections) are retried after a growing, random
pause; any other failure ends at once in one line. Credentials are the usual ones of fsspec's file systems; for http, a
``user:password@`` or a signature in the URL, which messages leave out. Set another S3 endpoint with
``AWS_ENDPOINT_URL`` or ``FSSPEC_S3_ENDPOINT_URL``.
"""

from __future__ import annotations

import base64
import http.client
import os
import random
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from ... import UsageError
from .block_cache import ReadStats

TIMEOUT_SECONDS = 60.0
ATTEMPTS = 6
FSSPEC_ATTEMPTS = 2  # s3fs and gcsfs already retry several times themselves
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
PASSING_STATUSES = {408, 425, 429}
PASSING_ERRORS = {"HTTPClientError", "ConnectionError", "ClientConnectionError", "ClientPayloadError"}

sleep: Callable[[float], None] = time.sleep  # replaced in tests
_jitter = random.SystemRandom()  # does not touch the generators that checkpoints restore

T = TypeVar("T")


class PassingError(Exception):
    """A temporary failure; ``after`` is the number of seconds that the server asks to wait."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class RemoteObject(Protocol):
    """A remote object; each call is one request and raises PassingError, FileNotFoundError or UsageError."""

    url: str
    attempts: int

    def describe(self) -> tuple[int, str]:
        """Return the size in bytes, and the ETag, time of the last change or ``""``."""

    def fetch(self, begin: int, end: int, size: int, identity: str) -> bytes:
        """Return the bytes of [begin, end) of the object with the size and identity from ``describe``."""

    def whole(self, limit: int) -> bytes:
        """Return all of an object of up to ``limit`` bytes."""


def open_remote(url: str) -> RemoteObject:
    """Return the object at a URL, without a request."""
    return HttpObject(url) if urlsplit(url).scheme.lower() in ("http", "https") else FsspecObject(url)


def shown(url: str) -> str:
    """Return a URL for messages, without password and query, which may contain secrets."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def persistently(call: Callable[[], T], what: str, attempts: int, stats: ReadStats) -> T:
    """Return the result of ``call``, tried up to ``attempts`` times with doubling pauses, each half random.

    Raises:
        UsageError: Every attempt failed; the message begins with ``what``.
    """
    for attempt in range(1, attempts + 1):
        stats.add(requests=1, retries=int(attempt > 1))
        try:
            return call()
        except PassingError as error:
            if attempt == attempts:
                raise UsageError(f"{what}: {error}, {attempts} times") from None
            pause = min(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1), LONGEST_PAUSE_SECONDS)
            sleep(max(pause * _jitter.uniform(0.5, 1.0), min(error.after, LONGEST_PAUSE_SECONDS)))
    raise AssertionError("attempts is below 1")


@dataclass
class HttpObject:
    """An object on an http or https server.

    A server that ignores ranges and sends the whole object is refused unless the whole object was requested: otherwise
    every small read would download a shard.
    """

    url: str
    attempts: int = ATTEMPTS

    def describe(self) -> tuple[int, str]:
        """Return size and identity from a request for one byte, because signed URLs refuse HEAD."""
        with self._answer({"Range": "bytes=0-0"}, accepted=(200, 206, 416)) as answer:
            found = re.fullmatch(r"bytes (?:0-0|\*)/(\d+)", answer.headers.get("Content-Range", ""))
            size = answer.headers.get("Content-Length") if answer.status == 200 else found and found[1]
            if not size:
                raise UsageError(f"{shown(self.url)}: the server does not send its size; copy it to a local disk")
            return int(size), _identity(answer.headers)

    def fetch(self, begin: int, end: int, size: int, identity: str) -> bytes:
        """Send one ranged request and check that the answer is that range of that object."""
        with self._answer({"Range": f"bytes={begin}-{end - 1}"}, accepted=(200, 206)) as answer:
            where = f"{shown(self.url)}, bytes {begin} to {end}"
            if _identity(answer.headers) != identity:
                raise UsageError(f"{where}: the object changed while it was read; start again with a complete corpus")
            if answer.status == 200 and (begin, end) != (0, size):
                raise UsageError(f"{where}: the server ignores ranges (200 with all of it); copy it to a local disk")
            expected, found = f"bytes {begin}-{end - 1}/{size}", answer.headers.get("Content-Range")
            if answer.status != 200 and found not in (expected, expected.rpartition("/")[0] + "/*"):
                raise UsageError(f"{where}: status {answer.status} with Content-Range {found!r}, expected {expected!r}")
            content = answer.read(end - begin + 1)
            if len(content) != end - begin:
                raise PassingError(f"{len(content)} bytes received, {end - begin} expected")
            return bytes(content)

    def whole(self, limit: int) -> bytes:
        """Send one request without a range."""
        with self._answer({}, accepted=(200,)) as answer:
            content = answer.read(limit + 1)
            if len(content) > limit:
                raise UsageError(f"{shown(self.url)}: more than {limit} bytes, which is too large to be read whole")
            length = answer.headers.get("Content-Length")
            if length is not None and int(length) != len(content):
                raise PassingError(f"{len(content)} bytes received, {length} expected")
            return bytes(content)

    @contextmanager
    def _answer(self, headers: dict[str, str], accepted: tuple[int, ...]) -> Iterator[Any]:
        request = _request(self.url, headers)
        try:
            try:
                answer = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
            except urllib.error.HTTPError as error:
                answer = error
            with answer:
                if answer.status not in accepted:
                    raise _failure(self.url, answer.status, answer.reason, answer.headers)
                yield answer
        except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
            if isinstance(error, FileNotFoundError):
                raise
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise UsageError(f"{shown(self.url)}: {reason.verify_message}") from None
            if isinstance(error, http.client.InvalidURL):
                raise UsageError(f"{shown(self.url)}: not a valid address") from None
            raise PassingError(str(reason) or type(reason).__name__) from None


@dataclass
class FsspecObject:
    """An object on one of fsspec's file systems (s3, gs, and others that are installed).

    Ranged reads do not return the ETag, so a change is noticed when the object is opened, not between two reads.
    """

    url: str
    attempts: int = FSSPEC_ATTEMPTS

    def describe(self) -> tuple[int, str]:
        """Return size and ETag from the file system's ``info``."""
        with fsspec_errors(self.url):
            info = file_system(self.url).info(self.url)
        if info.get("type") == "directory" or info.get("size") is None:
            raise FileNotFoundError(f"{shown(self.url)}: no such object")
        names = ("ETag", "etag", "md5Hash", "LastModified", "updated", "mtime")
        return int(info["size"]), next((str(info[name]) for name in names if info.get(name)), "")

    def fetch(self, begin: int, end: int, size: int, identity: str) -> bytes:
        """Send one ranged request."""
        with fsspec_errors(self.url):
            content = file_system(self.url).cat_file(self.url, start=begin, end=end)
        if len(content) != end - begin:
            raise PassingError(f"{len(content)} bytes received, {end - begin} expected")
        return bytes(content)

    def whole(self, limit: int) -> bytes:
        """Check the size, then return the whole object."""
        size, _ = self.describe()
        if size > limit:
            raise UsageError(f"{shown(self.url)}: {size} bytes, which is too large to be read whole")
        return self.fetch(0, size, size, "") if size else b""


def _request(url: str, headers: dict[str, str]) -> urllib.request.Request:
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    address = urlunsplit(parts._replace(netloc=host, fragment=""))
    address = quote(address, safe="%/:=&?~+!$,;'@()*[]")  # only what a request line cannot contain
    request = urllib.request.Request(address, headers={"User-Agent": "rewurst", **headers})
    if at:
        token = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")  # not sent to the host of a redirect
    return request


def _identity(headers: Any) -> str:
    return str(headers.get("ETag") or headers.get("Last-Modified") or "")


def _failure(url: str, status: int, reason: str, headers: Any) -> Exception:
    text = f"status {status} {reason}".rstrip()
    if status in PASSING_STATUSES or status >= 500:
        after = headers.get("Retry-After") or ""
        return PassingError(text, float(after) if after.isdecimal() else 0.0)
    if status in (404, 410):
        return FileNotFoundError(f"{shown(url)}: {text}")
    return UsageError(f"{shown(url)}: {text}")


_file_systems: dict[tuple[int, str], Any] = {}


def file_system(url: str) -> Any:
    """Return the process's file system for a URL; a client's event loop does not survive a fork."""
    import fsspec

    protocol = urlsplit(url).scheme.lower()
    key = (os.getpid(), protocol)
    if key not in _file_systems:
        try:
            _file_systems[key] = fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True)
        except ImportError:
            raise UsageError(f"{shown(url)}: {protocol}:// needs a package: pip install 'rewurst[remote]'") from None
        except ValueError as error:
            raise UsageError(f"{shown(url)}: {error}") from None
    return _file_systems[key]


@contextmanager
def fsspec_errors(url: str) -> Iterator[None]:
    """Turn a file system's exceptions into PassingError, FileNotFoundError or UsageError."""
    try:
        yield
    except UsageError:
        raise
    except FileNotFoundError:
        raise FileNotFoundError(f"{shown(url)}: no such object") from None
    except Exception as error:  # each backend has its own exceptions
        reason = " ".join(str(error).split()) or type(error).__name__
        refused = isinstance(error, PermissionError | NotADirectoryError | IsADirectoryError)
        names = {cls.__name__ for cls in type(error).__mro__}
        if not refused and (isinstance(error, OSError | TimeoutError) or names & PASSING_ERRORS):
            raise PassingError(reason) from None
        raise UsageError(f"{shown(url)}: {reason}") from None
