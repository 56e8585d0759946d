"""Gives an instance of our own a token, so that only its processes get in; import before Ray.

Ray itself would write one into ~/.ray/auth_token, which the umask mostly lets everybody read. What
the environment says of tokens already is left as it is. Ray reads the mode when it is imported; one
that was imported without turns it on by itself, from 2.60 on.
"""

from __future__ import annotations

import os
import secrets
import sys

import pipeline.executors.ray_settings  # noqa: F401 - before Ray, which reads them
from pipeline.base.variables import RAY_ADDRESS

if RAY_ADDRESS.read() is None:
    if "ray" not in sys.modules:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
