"""Exceptions that end an attempt of a stage."""


class StageError(Exception):
    """A failure that the user can correct; shown without a traceback, and never retried."""


class Preempted(BaseException):
    """Ends an attempt that was asked to stop, right after a checkpoint.

    Not an `Exception`, so that a stage that catches exceptions ends as well.
    """
