"""Which errors a retry may correct, said once; `docs/architecture.md` has the table.

A cell is a function of its key, so an error of its computing comes again: a mistake in the code, a
value that does not fit, too little memory. It gets one attempt. What comes from outside may pass,
and is retried: OSError and its kind (connections, disks), a RuntimeError, which libraries raise for
everything (CUDA, NCCL), and whatever is not known here; and deaths, which are no errors at all.
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
# By name, for this package imports no torch: its errors are RuntimeErrors to Python.
_LASTING_NAMES = {"OutOfMemoryError", "_LinAlgError"}
_NO_MEMORY = "can't allocate memory"  # what torch says where there is no GPU


def is_lasting(error: BaseException) -> bool:
    """Tell whether an error of a stage, or of the runner around it, stays until somebody acts.

    >>> is_lasting(KeyError("lr")), is_lasting(ConnectionError("reset")), is_lasting(RuntimeError())
    (True, False, False)
    """
    if isinstance(error, PipelineError):
        return not isinstance(error, StorageUnavailable)
    if isinstance(error, OSError):  # also where it is a ValueError as well, as in some libraries
        return False
    names = {cls.__name__ for cls in type(error).__mro__}
    return (
        isinstance(error, (StageError, *_LASTING))
        or not _LASTING_NAMES.isdisjoint(names)
        or (isinstance(error, RuntimeError) and _NO_MEMORY in str(error))
    )
