"""A proxy before an HTTP server that fails when it is told to."""

import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import urlsplit

ERROR = "<Error><Code>{}</Code><Message>on purpose</Message></Error>"
ANSWERS = {
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "403": (403, "AccessDenied"),
    "429": (429, "TooManyRequests"),
}


class FlakyProxy:
    """What goes wrong is decided by `fault`, for each request: method and path -> how, or None.

    `500`, `503`, `429`, `403`: such an answer, and the server never hears of the request. `drop`:
    the connection ends without an answer. `lost`: it does so after the server has done its work.
    `hang`: there is no answer, until the proxy is closed. Headers named in `dropped_headers` do not
    reach the server, as if it did not know them.
    """

    def __init__(self, upstream: str):
        self.upstream = urlsplit(upstream)
        self.fault: Callable[[str, str], str | None] = lambda method, path: None
        self.dropped_headers: set[str] = set()
        self.requests = 0
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def fail(self, *faults: str | None) -> None:
        """Let the next requests fail in these ways, one each, and the later ones pass."""
        left = list(faults)
        self.fault = lambda method, path: left.pop(0) if left else None

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            hop_by_hop: ClassVar = {"connection", "transfer-encoding", "content-length"}

            def handle_any(self) -> None:
                proxy.requests += 1
                body = self.body()
                fault = proxy.fault(self.command, self.path)
                if fault == "hang":
                    proxy.closing.wait(30)
                elif fault in ANSWERS:
                    status, code = ANSWERS[fault]
                    self.answer(status, [], ERROR.format(code).encode())
                    return
                elif fault != "drop":
                    status, headers, content = self.forward(body)
                    if fault is None:
                        self.answer(status, headers, content)
                        return
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

            def body(self) -> bytes:
                if self.headers.get("Expect") == "100-continue":
                    self.send_response_only(100)
                    self.end_headers()
                if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                chunks = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    chunks.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(chunks)

            def handle_expect_100(self) -> bool:
                return True

            def forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
                upstream = http.client.HTTPConnection(
                    proxy.upstream.hostname or "", proxy.upstream.port, timeout=30
                )
                headers = {
                    name: value
                    for name, value in self.headers.items()
                    if name.lower() not in self.hop_by_hop | proxy.dropped_headers | {"expect"}
                }
                upstream.request(self.command, self.path, body=body, headers=headers)
                response = upstream.getresponse()
                content = response.read()
                upstream.close()
                return response.status, response.getheaders(), content

            def answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
                self.send_response_only(status)
                length = str(len(content))
                for name, value in headers:
                    if name.lower() == "content-length":
                        length = value  # of a HEAD
                    elif name.lower() not in self.hop_by_hop:
                        self.send_header(name, value)
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

            def handle(self) -> None:
                try:
                    super().handle()
                except OSError:
                    pass  # the client has gone

        return Handler


@contextmanager
def flaky(upstream: str) -> Iterator[FlakyProxy]:
    """Yield a proxy before `upstream`; as long as nothing else is said it passes everything on."""
    proxy = FlakyProxy(upstream)
    try:
        yield proxy
    finally:
        proxy.close()
