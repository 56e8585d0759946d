"""The errors that a retry may correct; `docs/architecture.md` has the table.

A cell is a function of its key, so an error of its computation recurs: a mistake in the code, a
wrong value, too little memory. Such a cell gets one attempt. Errors from outside may pass, and are
retried: OSError and its subclasses (connections, disks), RuntimeError, which libraries raise for
everything (CUDA, NCCL), and every unknown error; and so are deaths of workers.
"""

from __future__ import annotations

from pipeline.base.errors import PipelineError, StorageUnavailable
from pipeline.stage import StageError

_LASTING = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    NameError,
    NotImplementedError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)
# Errors of torch, by name because this package imports no torch; they are RuntimeErrors.
_LASTING_NAMES = {"OutOfMemoryError", "_LinAlgError"}
_NO_MEMORY = "can't allocate memory"  # torch's message without a GPU


def is_lasting(error: BaseException) -> bool:
    """Tell whether an error of a stage, or of the runner around it, recurs until a user acts.

    >>> is_lasting(KeyError("lr")), is_lasting(ConnectionError("reset")), is_lasting(RuntimeError())
    (True, False, False)
    """
    if isinstance(error, PipelineError):
        return not isinstance(error, StorageUnavailable)
    if isinstance(error, OSError):  # some libraries' are ValueErrors as well
        return False
    names = {cls.__name__ for cls in type(error).__mro__}
    return (
        isinstance(error, (StageError, *_LASTING))
        or not _LASTING_NAMES.isdisjoint(names)
        or (isinstance(error, RuntimeError) and _NO_MEMORY in str(error))
    )
