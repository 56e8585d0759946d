"""Environment variables that Ray reads when it is imported; import this module first."""

from __future__ import annotations

import os

from pipeline.base.variables import RAY_ADDRESS

TOKENS = (  # the remedy when a cluster refuses a client
    "Set RAY_AUTH_MODE=token, and put the cluster's token into RAY_AUTH_TOKEN, into the file that "
    "RAY_AUTH_TOKEN_PATH names, or into ~/.ray/auth_token."
)

# Ray's switch for "no cluster beyond this machine": without it, a local instance listens on all
# network interfaces, and any client that reaches it may run code.
if RAY_ADDRESS.read() is None:
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# `run_task` itself hides the GPUs from CPU tasks; Ray would only warn that it no longer does.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
