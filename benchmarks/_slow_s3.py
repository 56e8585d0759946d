"""A real S3 endpoint on this machine (moto's), and a slow link to it.

    python -m benchmarks._slow_s3 PORT DELAY_S

is the link: it prints a port of this machine, and forwards each request to PORT after DELAY_S.
When its input closes, it prints the number of requests, and ends.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, cast

_METHODS = (b"GET ", b"PUT ", b"POST ", b"DELETE ", b"HEAD ")
_START_S = 30.0


@contextmanager
def serve_s3() -> Iterator[int]:
    """Serve an empty S3; yield its port.

    Raises:
        OSError: it does not begin.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(  # noqa: S603 - this interpreter, a fixed module
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port)
        yield port
    finally:
        server.kill()
        server.wait()


def _wait_for(port: int) -> None:
    end_s = time.monotonic() + _START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > end_s:
                raise
            time.sleep(0.05)


class SlowLink:
    """A separate process that delays requests and counts them.

    Args:
        port: where it leads.
        delay_s: how late a request arrives.

    Attributes:
        port: where it begins.
    """

    def __init__(self, port: int, delay_s: float):
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, this module
            [sys.executable, "-m", __name__, str(port), str(delay_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.port = int(cast(IO[bytes], self._process.stdout).readline())

    def close(self) -> int:
        """End the process, and return the number of requests."""
        answer, _ = self._process.communicate()
        return int(answer)


class _Link:
    """The link, in its process."""

    def __init__(self, port: int, delay_s: float):
        self._port = port
        self._delay_s = delay_s
        self.requests = 0

    async def serve(self) -> None:
        """Forward requests until the process ends."""
        server = await asyncio.start_server(self._pass_on, "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        await asyncio.gather(self._copy(reader, back, self._delay_s), self._copy(there, writer, 0))

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float
    ) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                if delay_s:
                    self.requests += data.startswith(_METHODS)
                    await asyncio.sleep(delay_s)
                writer.write(data)
                await writer.drain()
        writer.close()


def _main() -> None:
    link = _Link(int(sys.argv[1]), float(sys.argv[2]))
    threading.Thread(target=lambda: asyncio.run(link.serve()), daemon=True).start()
    sys.stdin.read()
    print(link.requests, flush=True)


if __name__ == "__main__":
    _main()
