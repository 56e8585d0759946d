"""The README and the docs are true: commands, links, examples, and the tree of files."""

import importlib
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from pipeline.cli.commands import app
from stages.columns import COLUMNS
from tests import module_tree
from tests.acceptance.readme import pieces
from tests.acceptance.walk import EXCEPTIONS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMAND = re.compile(r"^    (?:\w+=\S+ )*(fls .*?)(?:\s{2,}#.*)?$", re.MULTILINE)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = sorted({found for page in PAGES for found in COMMAND.findall(page.read_text("utf-8"))})
USAGE = (ROOT / "docs/usage.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_and_its_options_exist(command):
    _, name, *arguments = shlex.split(command)
    done = CliRunner().invoke(app, [name, "--help"])
    assert done.exit_code == 0, done.output
    for option in (argument for argument in arguments if argument.startswith("--")):
        assert option in done.output
    for file in (argument for argument in arguments if argument.endswith(".yaml")):
        assert (ROOT / file).is_file()


def test_there_are_commands():
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_link_leads_somewhere(page):
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)[^)]*\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


def test_the_readme_is_two_screens():
    assert len(README.encode()) <= 10_000
    assert max(map(len, README.splitlines())) <= 120


def test_make_acceptance_finds_the_commands_and_its_exceptions_are_among_them():
    commands = [one.text for one in pieces(README) if one.kind == "command"]
    assert {"make run", "fls results pipeline.yaml", "fls resume last"} <= set(commands)
    for beginning in EXCEPTIONS:
        assert any(command.startswith(beginning) for command in commands), beginning


def test_make_acceptance_refuses_a_line_that_is_no_known_command():
    with pytest.raises(ValueError, match="'    rm -r x' begins with none of make, "):
        list(pieces("Text.\n\n    rm -r x\n"))


def test_the_library_example_runs():
    (example,) = re.findall(r"```python\n(import fishleg\n.*?)```", README, re.DOTALL)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    data = torch.utils.data.TensorDataset(torch.randn(32, 1, 4, 4), torch.arange(32) % 3)
    names = {"model": model, "loader": torch.utils.data.DataLoader(data, batch_size=8)}
    exec(compile(example, "README.md", "exec"), names)  # noqa: S102 - our own README
    assert names["report"].removed == 43  # floor(0.9 * 48 + 1/2)
    assert int((model[1].weight == 0).sum()) == 43


def test_the_stage_of_ones_own_is_declared_and_runs(tmp_path, monkeypatch):
    modules = re.findall(r"```python\n# (mypackage/\w+\.py)\n(.*?)```", USAGE, re.DOTALL)
    assert len(modules) == 2
    for file, code in modules:
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    catalogue = importlib.import_module("mypackage.catalogue").CATALOGUE
    (stage,) = catalogue.stages
    module, _, function = stage.entry.partition(":")
    logged = []
    context = SimpleNamespace(
        input=lambda name: SimpleNamespace(path=tmp_path),
        params=stage.params(),
        log=logged.append,
    )
    getattr(importlib.import_module(module), function)(context)
    assert logged == [{"scale": 0.1}]


def test_the_columns_of_the_results_are_in_the_guide():
    for column in COLUMNS:
        unit = f" ({column.unit})" if column.unit else ""
        assert f"| `{column.name}` | {column.meaning}{unit} |\n" in USAGE


SHELL_LINES = re.compile(r"^(?: {4}|#   )((?:\w+=\S+ )*(?:fls|ray) .*)$", re.MULTILINE)


@pytest.mark.parametrize(
    "file",
    [
        "README.md",
        "docs/cluster.md",
        "docs/reliability.md",
        "docs/security.md",
        "pipeline.yaml",
        "deploy/submit.py",
    ],
)
def test_commands_hold_nothing_that_a_shell_would_take_for_a_pattern(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    for command in SHELL_LINES.findall(text):
        bare = re.sub(r"'[^']*'|\"[^\"]*\"|\s#.*", "", command)
        assert not set("[]*?") & set(bare), command


def test_the_tree_is_the_tree():
    text = module_tree.PAGE.read_text(encoding="utf-8")
    assert f"{module_tree.HEADING}\n{module_tree.tree()}\n" in text, "run `make tree`"
