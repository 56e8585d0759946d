"""Advice works: each command, option and name that a text gives is there, and some test runs it."""

import ast
import builtins
import functools
import inspect
import re
from contextlib import suppress

import pytest
import torch
import torch.utils.checkpoint
import typer
import yaml
from advice import PACKAGES, commands, names_of, pages, quoted, texts, words_run_by_tests

from pipeline.cli.commands import app
from pipeline.spec.shape import ClusterShape, FileShape, MlflowShape, ResourcesShape, StageShape
from stages.catalogue import CATALOGUE

CLI = typer.main.get_command(app).commands
OPTIONS = {
    option
    for command in CLI.values()
    for parameter in command.params
    for option in [*parameter.opts, *parameter.secondary_opts, "--help"]
    if option.startswith("--")
}
OURS = names_of(*PACKAGES)
# Commands of other programs that texts advise, by their first words.
OTHERS = {
    "mlflow": ["experiments", "restore", "-x"],
    "ray": ["start", "--head", "--dashboard-host"],
    "pip": ["install"],
    "chgrp": ["-R"],
    "chmod": ["-R"],
    "find": ["PLACEHOLDER", "-type", "d", "-exec", "chmod"],
}
FOREIGN = {*dir(builtins), "torch", "norm_except_dim"}
SENTENCE = re.compile(r"[a-z]+ [a-z]+")


@functools.cache
def torch_parameters() -> set[str]:
    """Return the names of parameters of torch's own functions and classes."""
    found = set()
    owners = [torch, torch.nn, torch.nn.functional, torch.utils.data, torch.utils.checkpoint]
    for one in [getattr(owner, name) for owner in owners for name in dir(owner)]:
        if callable(one):
            with suppress(ValueError, TypeError, NameError):  # not all tell
                found.update(inspect.signature(one).parameters)
    return found


def advised() -> list[tuple[str, list[str]]]:
    return [*commands(texts("pipeline", "stages")), *commands(pages())]


@pytest.mark.parametrize(("where", "words"), advised(), ids=lambda value: str(value)[:60])
def test_a_command_is_one_that_fls_takes(where: str, words: list[str]) -> None:
    name, *arguments = words
    assert name in [*CLI, "COMMAND"], where
    if name == "COMMAND":
        return
    arguments = [one for word in arguments if (one := word.strip("[].")) or word == "..."]
    command = CLI[name]
    required = [one for one in command.params if one.required and one.param_type_name == "argument"]
    if not arguments:  # a command that is named, not given
        return
    for option in (word for word in arguments if word.startswith("--")):
        known = {one for p in command.params for one in [*p.opts, *p.secondary_opts]}
        assert option in {*known, "--help"}, f"{where}: {option}"
    if (
        "--help" not in arguments
        and "|" not in " ".join(arguments)
        and len(arguments) >= len(required)
    ):
        takes_value = {"N": "1", "TIME": "9s", "9m": "9m"}
        command.make_context(name, [takes_value.get(word, word) for word in arguments])


def test_there_is_advice() -> None:
    assert len(advised()) > 60


def test_each_option_that_a_text_names_is_there() -> None:
    for one in texts("pipeline", "stages"):
        bare = re.sub(r"`(?!fls )[^`]*`", "", one.text)
        if SENTENCE.search(bare):
            for option in re.findall(r"(?<![\w/-])--[a-z][a-z-]+", bare):
                assert option in OPTIONS, f"{one.where}: {option}"


def test_a_test_runs_each_command_with_each_option_that_a_text_advises() -> None:
    known = words_run_by_tests()
    absent = set()
    for _, (name, *arguments) in advised():
        words = [word.strip("[]") for word in arguments]
        options = [word for word in words if word.startswith("--") and word != "--help"]
        for wanted in ({name}, *({name, option} for option in options)):
            if name in CLI and not any(wanted <= words for words in known):
                absent.add(" ".join(["fls", name, *wanted - {name}]))
    assert sorted(absent) == []


@functools.cache
def spec_keys() -> set[str]:
    shapes = [FileShape, StageShape, ResourcesShape, MlflowShape, ClusterShape]
    found = {one.alias or name for shape in shapes for name, one in shape.model_fields.items()}
    models = [stage.params for stage in CATALOGUE.stages]
    while models:
        for name, one in models.pop().model_fields.items():
            found.add(name)
            if hasattr(one.annotation, "model_fields"):
                models.append(one.annotation)
    return found


def unknown(part: str) -> str | None:
    """Return what is not there of something in backticks, or None."""
    if part.startswith("fls ") or "PLACEHOLDER" in {part, part.strip("{}")}:
        return None
    if re.fullmatch(r"[a-z_]+:( .*)?", part):
        value = yaml.safe_load(part.replace("{{", "{").replace("}}", "}").replace("...", "x"))
        (key, entry), *_ = value.items()
        inner = list(entry) if isinstance(entry, dict) else []
        missing = [name for name in [key] if name not in spec_keys()]
        return (
            ", ".join(missing + [one for one in inner if one not in spec_keys() | OURS.all]) or None
        )
    keyword = re.fullmatch(r"(\w+)=(.*)", part)
    if keyword:
        return None if keyword[1] in OURS.parameters else keyword[1]
    try:
        tree = ast.parse(part, mode="eval")
    except SyntaxError:
        return part
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            takes = OURS.callables.get(name, set())
            for one in node.keywords:
                if one.arg not in takes and "**" not in takes:
                    return f"{name}({one.arg}=)"
        word = getattr(node, "attr", getattr(node, "id", None))
        if word and word not in OURS.all | spec_keys() | FOREIGN:
            return str(word)
    return None


def test_each_name_that_a_text_puts_in_backticks_is_there() -> None:
    for one in texts(*PACKAGES):
        for part in quoted(one.text):
            if part.split()[0] in OTHERS or "\\" in part or "/" in part:
                continue
            assert unknown(part) is None, f"{one.where}: `{part}`: no {unknown(part)}"


def test_each_keyword_that_a_text_gives_is_a_parameter() -> None:
    for one in texts("fishleg", "stages"):
        if not SENTENCE.search(one.text):
            continue
        for name in re.findall(r"(?<![\w.{-])([a-z_]+)=(?=[\w\[({\"'.]|\s|$)", one.text):
            assert name in OURS.parameters | torch_parameters(), f"{one.where}: {name}="


def test_a_test_runs_each_command_of_another_program() -> None:
    known = words_run_by_tests()
    for one in texts(*PACKAGES):
        for part in quoted(one.text):
            program, *words = part.split()
            if program in OTHERS and words:
                assert words[: len(OTHERS[program])] == OTHERS[program], one.where
    for words in (OTHERS["mlflow"], OTHERS["ray"]):
        assert any(found.issuperset(words) for found in known), words
