"""The pages of the tracking server."""

from __future__ import annotations

import socket
import sys

from pipeline.base.secrets import presentable

_HOST = "127.0.0.1"


def serve_ui(uri: str, port: int) -> None:
    """Print the address of the MLflow pages, and serve those of a database until a signal.

    Args:
        uri: of the tracking server or database.
        port: wanted on 127.0.0.1; another one is taken when it is busy, or 0.
    """
    if uri.startswith(("http://", "https://")):
        sys.stdout.write(f"{presentable(uri)}\n")
        return
    from pipeline.tracking.ui_server import serve  # imports MLflow

    with _listen(port) as listener:
        serve(uri, listener)


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server((_HOST, port))
    except OSError:  # busy, or not permitted
        return socket.create_server((_HOST, 0))
