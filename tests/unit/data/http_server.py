"""A real HTTP server of a few files, which answers as badly as it is told to."""

import itertools
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class FaultyServer(ThreadingHTTPServer):
    """Serves `files` by name; `faults` holds what goes wrong with a file's next requests but HEAD, one after another.

    A fault is a status ("503"), or one of
        reset    half the body, then the connection is reset
        short    half the body, then the connection is closed
        half     half the body, ended in good order
        stall    half the body, then silence until the server closes
        drip     a byte every 20 ms
        whole    the whole file, as by a server that knows no ranges
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.faults: dict[str, Iterator[str]] = {}
        self.requests: Counter[str] = Counter()
        self.queries: set[str] = set()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fail(self, name: str, *faults: str) -> None:
        """Let the next requests of a file fail, one by one."""
        self.faults[name] = iter(faults)

    def fail_always(self, name: str, fault: str) -> None:
        self.faults[name] = itertools.repeat(fault)

    def handle_error(self, request, client_address) -> None:
        """A client that leaves early is part of the tests."""


@contextmanager
def served(files: dict[str, bytes]) -> Iterator[FaultyServer]:
    with FaultyServer(files) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_PUT(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        url = urlsplit(self.path)
        name = unquote(url.path).lstrip("/")
        self.server.requests[name] += 1
        self.server.queries.add(url.query)
        fault = "" if self.command == "HEAD" else next(self.server.faults.get(name, iter(())), "")
        if fault.isdigit() or name not in self.server.files:
            return self._refuse(int(fault or 404))
        content = self.server.files[name]
        start, stop = self._range(len(content))
        if start >= len(content):
            return self._refuse(416)
        ranged = "Range" in self.headers and fault != "whole"
        part = content[start:stop] if ranged else content
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part) // 2 if fault == "half" else len(part)))
        self.end_headers()
        if body:
            self._send(part, fault)

    def _range(self, size: int) -> tuple[int, int]:
        if "Range" not in self.headers:
            return 0, size
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        return int(first), min(int(last) + 1, size)

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, part: bytes, fault: str) -> None:
        half = part[: len(part) // 2]
        if fault == "drip":
            for place in range(len(part)):
                self.wfile.write(part[place : place + 1])
                if self.server.closing.wait(0.02):
                    return
        elif fault in ("half", "reset", "short", "stall"):
            self.wfile.write(half)
            if fault == "stall":
                self.server.closing.wait()
            if fault == "reset":  # to close without lingering sends a reset
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.close_connection = fault != "half"
        else:
            self.wfile.write(part)
