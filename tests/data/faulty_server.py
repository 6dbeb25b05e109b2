"""A web server on the loopback interface that misbehaves as it is told to."""

import hashlib
import re
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Request:
    path: str  #: with its query
    range: str | None
    condition: str | None  #: If-None-Match
    authorization: str | None


@dataclass
class FaultyServer:
    """Files by path; `faults[path]` are used up by its requests one after the other, then it behaves.

    A fault is a status code, or (what, after how many bytes): `drop` ends the connection though more was announced,
    `truncate` announces nothing and ends, `stall` sends nothing more; or `no-range`, which answers with the whole file.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, deque] = field(default_factory=lambda: defaultdict(deque))
    requests: list[Request] = field(default_factory=list)
    sent: int = 0  #: bytes of bodies
    most_at_once: int = 0
    url: str = ""
    released: threading.Event = field(default_factory=threading.Event)  #: set: stalled answers end
    stalled: threading.Event = field(default_factory=threading.Event)  #: an answer stalls now
    gate: threading.Event | None = None  #: answers wait for it
    _running: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, path: str, *faults: object) -> None:
        self.faults[path].extend(faults)

    def ranges(self) -> list[str | None]:
        return [request.range for request in self.requests]


@contextmanager
def faulty_server() -> Iterator[FaultyServer]:
    server = FaultyServer()
    listener = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"faulty": server}))
    listener.daemon_threads = True
    server.url = f"http://127.0.0.1:{listener.server_port}"
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        listener.shutdown()
        listener.server_close()


class _Handler(BaseHTTPRequestHandler):
    faulty: FaultyServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.faulty
        with server._lock:
            server._running += 1
            server.most_at_once = max(server.most_at_once, server._running)
        try:
            if server.gate is not None:
                server.gate.wait()
            self._answer()
        finally:
            with server._lock:
                server._running -= 1

    def _answer(self) -> None:
        server, name = self.faulty, self.path.partition("?")[0]
        asked = self.headers.get("Range")
        server.requests.append(
            Request(self.path, asked, self.headers.get("If-None-Match"), self.headers.get("Authorization"))
        )
        fault = server.faults[name].popleft() if server.faults[name] else None
        if isinstance(fault, int) or name not in server.files:
            self._status(fault if isinstance(fault, int) else 404)
            return
        data = server.files[name]
        tag = f'"{hashlib.md5(data).hexdigest()}"'
        if self.headers.get("If-None-Match") == tag:
            self._status(304)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
        if fault == "no-range" or self.headers.get("If-Range", tag) != tag:
            start = 0
        if start >= len(data) > 0:
            self._status(416)
            return
        what, after = fault if isinstance(fault, tuple) else ("", len(data))
        body = data[start : start + after]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if what != "truncate":
            self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
        server.sent += len(body)
        if what == "stall":
            server.stalled.set()
            server.released.wait()
        if what:
            self.close_connection = True

    def _status(self, code: int) -> None:
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()
