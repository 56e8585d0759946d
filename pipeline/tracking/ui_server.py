"""MLflow's pages on a database, behind a password.

Every user of the machine reaches 127.0.0.1, and any client of MLflow may delete runs, and read and
write files of the user who serves it. So the printed link has a password, new each time, and every
request needs it.
"""

from __future__ import annotations

import base64
import hmac
import os
import queue
import secrets
import socket
import sys
import threading
import warnings
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import pipeline.tracking.mlflow_settings  # noqa: F401 - before MLflow, which reads them

# isort: split
import sqlalchemy
import uvicorn
from mlflow.exceptions import MlflowException
from mlflow.server.constants import (
    ARTIFACT_ROOT_ENV_VAR,
    BACKEND_STORE_URI_ENV_VAR,
    REGISTRY_STORE_URI_ENV_VAR,
)
from mlflow.store.db.db_types import DATABASE_ENGINES
from sqlalchemy.exc import SQLAlchemyError

from pipeline.base.errors import PipelineError
from pipeline.tracking.mlflow_server import ADVICE, artifacts_beside, connect, database_of, unusable

USER = "fls"
_ENTRANCE = "/fls"  # leads to the pages, see `_Guard`
_PATIENCE_S = 15.0

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[_Message, _Receive, _Send], Awaitable[None]]


def serve(uri: str, listener: socket.socket) -> None:
    """Print the link to MLflow's pages and serve them until a signal.

    Args:
        uri: of a database.
        listener: an open server socket.
    """
    _check(uri)
    host, port = listener.getsockname()
    password = secrets.token_urlsafe(24)
    guard = _Guard(_pages(uri, f"{host}:{port}"), f"http://{host}:{port}", password)
    sys.stdout.write(f"http://{USER}:{password}@{host}:{port}{_ENTRANCE}  (Ctrl-C closes it)\n")
    sys.stdout.flush()
    config = uvicorn.Config(guard, log_level="warning", access_log=False)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        sys.exit(130)  # a shell's code for SIGINT


def _check(uri: str) -> None:
    """Try a database once, because MLflow retries a silent one for minutes.

    Raises:
        PipelineError: the database cannot be used.
    """
    database = database_of(uri)
    try:
        is_made = database is None or (database.is_file() and database.stat().st_size > 0)
        if is_made and uri.partition(":")[0].partition("+")[0] in DATABASE_ENGINES:
            _ask(uri)
        connect(uri)
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        reason = (
            getattr(error, "orig", None) or error
        )  # the driver's message, without SQLAlchemy's advice
        text = " ".join(unusable(uri, reason).split())
        raise PipelineError(f"{text}. {ADVICE}") from error


def _ask(uri: str) -> None:
    """Connect to a database once; errors of the database's driver pass unchanged.

    Raises:
        TimeoutError: the database does not answer.
    """
    answers: queue.Queue[Exception | None] = queue.Queue()

    def ask() -> None:
        try:
            engine = sqlalchemy.create_engine(uri)
            sqlalchemy.inspect(engine).get_table_names()
            engine.dispose()
            answers.put(None)
        except Exception as error:  # each driver has exceptions of its own
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        error = answers.get(timeout=_PATIENCE_S)
    except queue.Empty:
        raise TimeoutError(f"no answer within {_PATIENCE_S:.0f} s") from None
    if error is not None:
        raise error


def _pages(uri: str, address: str) -> _App:
    """Return MLflow's pages at an address, for requests from these pages only.

    MLflow does not proxy artifacts: the pages read a run's files directly.
    """
    os.environ[BACKEND_STORE_URI_ENV_VAR] = os.environ[REGISTRY_STORE_URI_ENV_VAR] = uri
    database = database_of(uri)
    if database is not None:
        os.environ[ARTIFACT_ROOT_ENV_VAR] = artifacts_beside(database)
    os.environ["MLFLOW_SERVER_ALLOWED_HOSTS"] = address
    os.environ["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"] = f"http://{address}"
    os.environ["MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE"] = "false"
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # no use for it here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MLflow's, about what it imports
        from mlflow.server.fastapi_app import app  # reads these
    return app


class _Guard:
    """Answers requests without the password by 401, and those from other pages by 403.

    MLflow itself accepts requests from pages of any other server on this machine.

    A page with a password in its address may send no further requests, so the link leads to an
    entrance, which redirects to the address without the password; browsers keep the password.

    Args:
        app: the guarded application.
        address: of the pages, as a browser's origin.
        password: of `USER`.
    """

    def __init__(self, app: _App, address: str, password: str):
        self._app = app
        self._address = address.encode()
        self._expected = b"Basic " + base64.b64encode(f"{USER}:{password}".encode())

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """Answer an ASGI request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._expected):
            challenge = (b"www-authenticate", b'Basic realm="fls ui: the password is in its link"')
            await _refuse(scope, send, 401, challenge)
        elif headers.get(b"origin", self._address) != self._address:
            await _refuse(scope, send, 403)
        elif scope["path"] == _ENTRANCE:
            await _answer(send, 303, (b"location", self._address + b"/"))
        else:
            await self._app(scope, receive, send)


async def _refuse(scope: _Message, send: _Send, status: int, *headers: tuple[bytes, bytes]) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
    else:
        await _answer(send, status, *headers, body=b"Use the link that `fls ui` printed.\n")


async def _answer(
    send: _Send, status: int, *headers: tuple[bytes, bytes], body: bytes = b""
) -> None:
    plain = (b"content-type", b"text/plain")
    await send({"type": "http.response.start", "status": status, "headers": [plain, *headers]})
    await send({"type": "http.response.body", "body": body})
