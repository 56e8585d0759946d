"""What `apply` can do to a number."""

from toy.operations.plus import plus
from toy.operations.times import times

__all__ = ["plus", "times"]
