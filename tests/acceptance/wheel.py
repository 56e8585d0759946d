"""Builds the wheel, installs it beside torch alone, and uses the library there.

    python -m tests.acceptance.wheel

Needs a package index (or a folder of wheels that pip is told of), and a minute on two cores.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from email.message import Message
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["pyproject.toml", "README.md", "LICENSE", "fishleg", "stages", "pipeline"]
PIP = ["-m", "pip", "--disable-pip-version-check"]


def main() -> None:
    """Run all steps; the first that fails ends it with an error."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("building the wheel")
        wheel = build(folder)
        say(f"installing {wheel.name} into an environment of its own")
        python = install(folder, wheel)
        say("checking what is installed")
        check_contents(python)
        say("running the three lines")
        script = Path(shutil.copy(ROOT / "tests/acceptance/three_lines.py", folder))
        # torch says so once where numpy is not installed
        quiet = ["-W", "error", "-W", "ignore:Failed to initialize NumPy:UserWarning"]
        run([python, *quiet, script], folder)
        say("asking fls what it lacks")
        check_command(python, folder)
    say("the wheel is complete")


def build(folder: Path) -> Path:
    """Return the wheel, built from a copy, so that no earlier build leaks into it."""
    copy = folder / "source"
    copy.mkdir()
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, copy)
    run([sys.executable, *PIP, "wheel", "-q", "--no-deps", "-w", folder, copy], folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(folder: Path, wheel: Path) -> Path:
    """Return the Python of a new environment that has the wheel and what it requires."""
    run([sys.executable, "-m", "venv", folder / "venv"], folder)
    python = folder / "venv" / "bin" / "python"
    run([python, *PIP, "install", "-q", "-c", ROOT / "constraints.txt", wheel], folder)
    run([python, *PIP, "check"], folder)
    return python


def check_contents(python: Path) -> None:
    """Check that the wheel requires torch and safetensors alone, and brings its license."""
    (site,) = (python.parents[1] / "lib").glob("python*/site-packages")
    (info,) = site.glob("fishleg_surgeon-*.dist-info")
    metadata = Parser().parsestr((info / "METADATA").read_text("utf-8"))
    required = requirements(metadata)
    expect(set(required[""]) == {"torch", "safetensors"}, f"it requires {required['']}")
    installed = {name_of(path.name.split("-")[0]) for path in site.glob("*.dist-info")}
    extra = installed.intersection(set(required["pipeline"]) | {"numpy"}) - {"fsspec"}  # torch's
    expect(not extra, f"packages of the extra `pipeline` are installed: {sorted(extra)}")
    for name in ("s3", "server", "dev"):
        expect("fishleg-surgeon" in required[name], f"the extra {name} lacks `pipeline`")
    expect(metadata["License-Expression"] == "Apache-2.0", "the license is not Apache-2.0")
    expect((info / "licenses" / "LICENSE").is_file(), "the text of the license is missing")
    expect((site / "fishleg" / "py.typed").is_file(), "fishleg/py.typed is missing")


def requirements(metadata: Message) -> dict[str, list[str]]:
    """Return extra -> names of the packages that it requires; "" for those always required."""
    found: dict[str, list[str]] = {"": []}
    for name in metadata.get_all("Provides-Extra", []):
        found[name] = []
    for line in metadata.get_all("Requires-Dist", []):
        requirement, _, marker = line.partition(";")
        extra = marker.partition("extra ==")[2].strip(" '\"")
        found[extra].append(name_of(requirement))
    return found


def name_of(requirement: str) -> str:
    """Return the normal form of a package's name, without versions and extras."""
    end = next((i for i, c in enumerate(requirement) if c in "[<>=!~ "), len(requirement))
    return requirement[:end].replace("_", "-").lower()


def check_command(python: Path, folder: Path) -> None:
    """Check that fls says in one sentence what to install."""
    command = [str(python.parent / "fls"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    expect(done.returncode == 2, f"fls ended with {done.returncode}: {done.stderr}")
    expect(done.stderr.count("\n") == 1, f"fls said {done.stderr!r}")
    expect("pip install 'fishleg-surgeon[pipeline]'" in done.stderr, f"fls said {done.stderr!r}")


def run(command: Sequence[str | Path], folder: Path) -> None:
    """Run a command in a folder from which the clone cannot be imported."""
    subprocess.run([str(word) for word in command], cwd=folder, check=True)


def expect(holds: bool, otherwise: str) -> None:
    """End with an error unless something holds."""
    if not holds:
        sys.exit(f"wheel: {otherwise}")


def say(text: str) -> None:
    """Print one line."""
    print(f"wheel: {text}", flush=True)


if __name__ == "__main__":
    main()
