"""The errors that are outages: of a connection, a server or a disk that may recover."""

from __future__ import annotations

import errno
import socket

from pipeline.base.errors import PipelineError, StorageUnavailable

PASSING_STATUS = {408, 429, 502, 503, 504}  # of HTTP
_PASSING = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.EDQUOT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EIO,
    errno.EMFILE,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENFILE,
    errno.ENOSPC,
    errno.EROFS,
    errno.ESTALE,
}
# Of optional libraries, whose classes are not OSErrors.
_OTHERS = {
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.HTTPClientError",
    "google.auth.exceptions.TransportError",
    "azure.core.exceptions.ServiceRequestError",
    "azure.core.exceptions.ServiceResponseError",
    "urllib3.exceptions.HTTPError",
}


def may_pass(error: BaseException | None) -> bool:
    """Tell whether an error, or one of its causes, is an outage.

    >>> may_pass(ConnectionResetError()), may_pass(KeyError("host")), may_pass(FileNotFoundError())
    (True, False, False)
    """
    while error is not None:
        if isinstance(error, StorageUnavailable) or _is_outage(error):
            return True
        if isinstance(error, PipelineError):  # its text has the reason
            return False
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def _is_outage(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError | socket.gaierror):
        return True
    if not isinstance(error, OSError):
        return any(f"{one.__module__}.{one.__name__}" in _OTHERS for one in type(error).__mro__)
    if error.errno is not None:
        return error.errno in _PASSING
    if not hasattr(error, "response") or isinstance(
        error, ValueError
    ):  # a bad address, of requests
        return False
    return error.response is None or error.response.status_code in PASSING_STATUS
