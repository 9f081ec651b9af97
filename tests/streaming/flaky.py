"""A real HTTP server on loopback that is ill when it is told to be."""

import os
import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Answer = Callable[["Handler", bytes, int], None]  # (request, all that it asked for, HTTP status if all is well)

PAGE = b"<!DOCTYPE html><html><body>Sign in to the network</body></html>"


class Server(ThreadingHTTPServer):
    """Serves `files`, /name -> bytes. `script`, /name -> answers to its next GETs; then `always`; then what it has."""

    daemon_threads = True
    ranges = True  # whether it knows them

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.script: dict[str, list[Answer]] = defaultdict(list)
        self.always: dict[str, Answer] = {}
        self.requests: list[tuple[str, str]] = []  # method, /name
        self.headers: list[dict[str, str]] = []
        self.sent = 0  # megabytes of endless answers
        self.arrived = threading.Semaphore(0)  # of GETs
        self.ended = threading.Event()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, name: str) -> int:
        """GETs of it so far."""
        return self.requests.count(("GET", name))

    def answer(self, name: str) -> Answer:
        with self._lock:
            return self.script[name].pop(0) if self.script[name] else self.always.get(name, ok)

    def handle_error(self, request, client_address):
        """Clients that go away are no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer takes 40 ms
    server: Server

    def do_GET(self):
        self.server.requests.append((self.command, self.path))
        self.server.headers.append(dict(self.headers))
        self.server.arrived.release()
        data = self.server.files.get(self.path)
        if data is None:
            return self.fault(404)
        wanted = self.headers.get("Range") if self.server.ranges else None
        if wanted is None:
            return self.server.answer(self.path)(self, data, 200)
        first, last = (int(digits or len(data)) for digits in wanted.removeprefix("bytes=").split("-"))
        if first >= len(data):
            return self.fault(416)
        return self.server.answer(self.path)(self, data[first : last + 1], 206)

    def do_HEAD(self):
        self.server.requests.append((self.command, self.path))
        known = self.path in self.server.files
        self.begin(200 if known else 404, len(self.server.files.get(self.path, b"")))

    def fault(self, code: int):
        self.send(code, b"an error page")

    def begin(self, code: int, length: int, **headers: str):
        self.send_response(code)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def send(self, code: int, data: bytes, **headers: str):
        self.begin(code, len(data), **headers)
        self.wfile.write(data)

    def log_message(self, format, *args):
        """Quiet."""


def ok(request: Handler, data: bytes, code: int):
    request.send(code, data)


def status(code: int, **headers: str) -> Answer:
    return lambda request, data, _: request.send(code, b"an error page", **headers)


missing = status(404)


def page(request: Handler, data: bytes, code: int):
    request.send(200, PAGE, Content_Type="text/html")


def empty(request: Handler, data: bytes, code: int):
    request.send(code, b"")


def half(request: Handler, data: bytes, code: int):
    """Says honestly that it is half of it."""
    request.send(code, data[: len(data) // 2])


def flipped(request: Handler, data: bytes, code: int):
    request.send(code, data[:-1] + bytes([data[-1] ^ 1]))


def longer(request: Handler, data: bytes, code: int):
    request.send(code, data + bytes(1024))


def endless(request: Handler, data: bytes, code: int):
    """A hundred megabytes, if the other side takes them."""
    request.begin(code, 100 << 20)
    for _ in range(100):
        request.wfile.write(bytes(1 << 20))
        request.server.sent += 1


def short(request: Handler, data: bytes, code: int):
    """Promises all, sends half."""
    request.begin(code, len(data))
    request.wfile.write(data[: len(data) // 2])
    request.close_connection = True


def stall(request: Handler, data: bytes, code: int):
    """Sends half and falls silent."""
    request.begin(code, len(data))
    request.wfile.write(data[: len(data) // 2])
    request.wfile.flush()
    request.server.ended.wait()
    request.close_connection = True


def reset(request: Handler, data: bytes, code: int):
    request.begin(code, len(data))
    request.wfile.write(data[: len(data) // 2])
    request.wfile.flush()
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST, not FIN
    os.close(request.connection.detach())
    request.close_connection = True


@contextmanager
def serving(folder: Path | None = None) -> Iterator[Server]:
    server = Server()
    if folder is not None:
        server.files |= {f"/{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()
