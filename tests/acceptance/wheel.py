"""Builds the wheel, and does with it what the README has a reader do without a clone.

Needs a package index, or a folder of wheels that pip is told of.
"""

from __future__ import annotations

import shutil
import sys
from email.message import Message
from email.parser import Parser
from pathlib import Path

from tests.acceptance.own_folder import OwnFolder
from tests.acceptance.readme import ROOT, Piece
from tests.acceptance.shell import Shell, step
from tests.acceptance.walk import expect

SOURCES = ["pyproject.toml", "README.md", "LICENSE", "fishleg", "stages", "pipeline"]
PIP = "pip --disable-pip-version-check"
_NAME = "fishleg-surgeon"


def use(shell: Shell, clone: Path, found: list[Piece]) -> None:
    """Build the wheel, install it as the README does, and use it in a folder without the clone."""
    plain, whole = [one.text for one in found if one.text.startswith("pip install")]
    expect(plain == f"pip install {_NAME}", f"the first installation is {plain!r}")
    wheel = build(shell, clone)
    shell.run(f"{sys.executable} -m venv {shell.folder / 'venv'}")
    shell.activation = f"source {shell.folder / 'venv' / 'bin' / 'activate'}"
    install(shell, plain, wheel)
    with step("check what the wheel brings"):
        check_contents(shell.folder / "venv")
    three_lines(shell, [one.text for one in found if one.kind == "code"])
    output = shell.run("fls --help", expected=2)
    expect(output.count("\n") == 1 and whole in output, f"fls said {output!r}")
    install(shell, whole, wheel)
    OwnFolder(shell, [one.text for one in found if one.kind == "key"]).use()


def build(shell: Shell, clone: Path) -> Path:
    """Return the wheel, built from a copy, so that no earlier build leaks into it."""
    copy = shell.folder / "source"
    copy.mkdir()
    for name in SOURCES:
        path = clone / name
        if path.is_dir():
            shutil.copytree(path, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, copy)
    shell.run(
        f"{sys.executable} -m {PIP} wheel -q --no-deps -w {shell.folder} {copy}",
        shown="pip wheel",
    )
    (wheel,) = shell.folder.glob("*.whl")
    return wheel


def install(shell: Shell, command: str, wheel: Path) -> None:
    """Run a `pip install` of the README, with the wheel in place of the index's."""
    here = f"{PIP} install -q -c {ROOT / 'constraints.txt'}"
    local = command.replace("pip install", here).replace(_NAME, str(wheel))
    shell.run(f"{local}\n{PIP} check", shown=command)


def three_lines(shell: Shell, blocks: list[str]) -> None:
    """Run the README's blocks on a network of one's own, where torch alone is installed."""
    script = Path(shutil.copy(ROOT / "tests/acceptance/three_lines.py", shell.folder))
    # torch says so once where numpy is not installed
    quiet = "-W error -W 'ignore:Failed to initialize NumPy:UserWarning'"
    for number, text in enumerate(blocks):
        block = shell.folder / f"block{number}.py"
        block.write_text(text, encoding="utf-8")
        shell.run(f"python {quiet} {script.name} own {block.name}")


def check_contents(environment: Path) -> None:
    """Check that the wheel requires torch and safetensors alone, and brings its license."""
    (site,) = (environment / "lib").glob("python*/site-packages")
    (info,) = site.glob("fishleg_surgeon-*.dist-info")
    metadata = read_metadata(info)
    required = requirements(metadata)
    expect(set(required[""]) == {"torch", "safetensors"}, f"it requires {required['']}")
    (torch,) = site.glob("torch-*.dist-info")
    torchs_own = requirements(read_metadata(torch))[""]
    installed = {name_of(path.name.split("-")[0]) for path in site.glob("*.dist-info")}
    extra = installed.intersection({*required["pipeline"], "numpy"}) - set(torchs_own)
    expect(not extra, f"packages of the extra `pipeline` are installed: {sorted(extra)}")
    for name in ("s3", "server", "dev"):
        expect(_NAME in required[name], f"the extra {name} lacks `pipeline`")
    expect(metadata["License-Expression"] == "Apache-2.0", "the license is not Apache-2.0")
    expect((info / "licenses" / "LICENSE").is_file(), "the text of the license is missing")
    expect((site / "fishleg" / "py.typed").is_file(), "fishleg/py.typed is missing")


def read_metadata(info: Path) -> Message:
    """Return the metadata of an installed package."""
    return Parser().parsestr((info / "METADATA").read_text("utf-8"))


def requirements(metadata: Message) -> dict[str, list[str]]:
    """Return extra -> names of the packages that it requires; "" for those always required."""
    found: dict[str, list[str]] = {"": []}
    for name in metadata.get_all("Provides-Extra", []):
        found[name] = []
    for line in metadata.get_all("Requires-Dist", []):
        requirement, _, marker = line.partition(";")
        extra = marker.partition("extra ==")[2].strip(" '\"")
        found.setdefault(extra, []).append(name_of(requirement))
    return found


def name_of(requirement: str) -> str:
    """Return the normal form of a package's name, without versions and extras."""
    end = next((i for i, c in enumerate(requirement) if c in "[<>=!~ "), len(requirement))
    return requirement[:end].replace("_", "-").lower()
