"""Shifts the clock of every Python process that finds this file, by SKEW_S seconds."""

import os
import time

_true = time.time
_true_ns = time.time_ns
_SKEW_S = float(os.environ.get("SKEW_S", "0"))
time.time = lambda: _true() + _SKEW_S
time.time_ns = lambda: _true_ns() + int(_SKEW_S * 10**9)
