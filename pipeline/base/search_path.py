"""Where Python looks for modules: in the working directory last, here and in processes of ours.

Others may be able to write to the folder that one stands in. A `ray.py` or `yaml.py` there must not
be taken for the package that is installed.
"""

import os
import sys


def look_here_last() -> None:
    """Search the working directory behind all else, unless PYTHONPATH names it."""
    try:
        here = os.getcwd()
    except FileNotFoundError:  # deleted by now, so nothing is found in it
        return
    if here in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        return
    sys.path[:] = [*(path for path in sys.path if path not in {"", here}), here]


def look_here_too() -> None:
    """Search the working directory behind all else, unless it is searched already."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)


def python_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module in a process that finds what this one would find.

    With it goes `search_variable`.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def search_variable() -> dict[str, str]:
    """Return the variable that tells such a process where this one looks."""
    return {"PYTHONPATH": os.pathsep.join([path or os.getcwd() for path in sys.path])}
