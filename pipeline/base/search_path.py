"""Python's search path, with the working directory last, here and in child processes.

So a `ray.py` or `yaml.py` in the working directory does not replace the installed package.
"""

import os
import sys


def look_here_last() -> None:
    """Search the working directory last, unless PYTHONPATH names it."""
    try:
        here = os.getcwd()
    except FileNotFoundError:  # deleted
        return
    if here in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        return
    sys.path[:] = [*(path for path in sys.path if path not in {"", here}), here]


def look_here_too() -> None:
    """Add the working directory to the end of the search path, unless it is there."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)


def python_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module; with `search_variable`, it has this search path."""
    return [sys.executable, "-P", "-m", module, *arguments]


def search_variable() -> dict[str, str]:
    """Return PYTHONPATH with the search path of this process."""
    return {"PYTHONPATH": os.pathsep.join([path or os.getcwd() for path in sys.path])}
