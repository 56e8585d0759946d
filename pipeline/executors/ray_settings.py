"""What Ray reads from the environment when it is imported; import this before it."""

from __future__ import annotations

import os

from pipeline.base.variables import RAY_ADDRESS

TOKENS = (  # what to tell somebody whom a cluster does not let in
    "Set RAY_AUTH_MODE=token, and put the cluster's token into RAY_AUTH_TOKEN, into the file that "
    "RAY_AUTH_TOKEN_PATH names, or into ~/.ray/auth_token."
)

# Ray's switch for "no cluster beyond this machine": without it, a local instance listens on all
# network interfaces, and any client that reaches it may run code.
if RAY_ADDRESS.read() is None:
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# `run_task` itself hides the GPUs from CPU tasks; Ray only warns that it will not any more.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
