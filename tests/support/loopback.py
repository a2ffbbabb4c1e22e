"""An http server with ranges on loopback that serves shards."""

from __future__ import annotations

import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Behaviour:
    """Behavior of the server; ``failures`` are the statuses of the next answers, 0 resets the connection."""

    objects: dict[str, bytes] = field(default_factory=dict)
    failures: list[int] = field(default_factory=list)
    retry_after: str = ""
    etag: str = '"one"'
    ignores_range: bool = False
    cut: int = 0
    shift: int = 0
    ranges: list[str] = field(default_factory=list)
    credentials: list[str] = field(default_factory=list)
    redirect: str = ""
    lock: Any = field(default_factory=threading.Lock)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        behaviour: Behaviour = self.server.behaviour  # type: ignore[attr-defined]
        with behaviour.lock:
            behaviour.ranges.append(self.headers.get("Range", ""))
            failure = behaviour.failures.pop(0) if behaviour.failures else None
            behaviour.credentials.append(self.headers.get("Authorization", ""))
        content = behaviour.objects.get(self.path.partition("?")[0])
        if failure == 0:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()  # with this option: a reset
        elif self.path == "/moved":
            self.answer(302, b"", {"Location": behaviour.redirect})
        elif failure or content is None:
            self.answer(failure or 404, b"<html>", {"Retry-After": behaviour.retry_after})
        else:
            self.range(behaviour, content)

    def range(self, behaviour: Behaviour, content: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        headers = {"ETag": behaviour.etag} if behaviour.etag else {}
        if asked is None or behaviour.ignores_range:
            self.answer(200, content, headers)
            return
        begin, end = int(asked[1]) + behaviour.shift, min(int(asked[2]) + 1 + behaviour.shift, len(content))
        if begin >= len(content):
            self.answer(416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
            return
        cut = behaviour.cut if end - begin > 1 else 0
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
        self.answer(206, content[begin:end], headers, cut)

    def answer(self, status: int, body: bytes, headers: dict[str, str], cut: int = 0) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) - cut])


class Server:
    """Server on loopback."""

    def __init__(self) -> None:
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.behaviour = Behaviour()
        self.http.behaviour = self.behaviour  # type: ignore[attr-defined]
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def url(self, path: str = "/a/x.tar") -> str:
        return f"http://127.0.0.1:{self.http.server_port}{path}"

    def stop(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()
