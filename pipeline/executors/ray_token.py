"""Gives an own instance of Ray a token, so that only its processes connect; import before Ray.

Ray itself would write a token into ~/.ray/auth_token, mostly readable by every user. Token settings
of the environment stay as they are. Ray reads the mode when it is imported; from 2.60 on, it turns
token authentication on by itself.
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
