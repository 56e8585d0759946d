"""Runs the commands and blocks of the README in a clone, `EXCEPTIONS` in the nearest way."""

from __future__ import annotations

import base64
import contextlib
import random
import re
import sys
import tempfile
import urllib.request
from pathlib import Path
from secrets import token_hex

from tests.acceptance.shell import Shell, step
from tests.pipeline.ray_heads import Head, start_head
from tests.pipeline.servers import mlflow_server

EXCEPTIONS = {
    "make test": "only its recipe is shown: it takes ten minutes, and `make check` has run it",
    "fls ui": "its link is opened, then it gets Ctrl-C",
    "fls resume last": "a run is interrupted before it",
    "fls list STAGE": "STAGE is pretrain",
    "RAY_ADDRESS=ray-head:6379": "one machine has the Ray head and the MLflow server; one cell of "
    "each kind, on a few images of noise, in place of CIFAR-10 on GPUs",
    "fls submit": "the Ray head is on this machine",
    "pip install": "from the wheel of this clone, in place of a package index",
}
_SMALL = (
    "vars.gpus=0 vars.width=4 vars.epochs=2 vars.seeds=[0] vars.methods=[fishleg] "
    "vars.sparsities=[0.5] vars.samples=50 vars.steps=2 vars.epochs_per_step=1 "
    "vars.finetuning_epochs=1 vars.fishleg.steps=5 vars.fishleg.refine_steps=5 dense.verify=false"
)
_NOISE_IMAGES = 60


class Walk(contextlib.AbstractContextManager["Walk"]):
    """A walk through the README in a clone; the servers that it starts end with it."""

    def __init__(self, shell: Shell) -> None:
        self.shell = shell
        self._stack = contextlib.ExitStack()
        self._servers: tuple[Head, str] | None = None

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def command(self, text: str) -> None:
        """Run a command of the README."""
        if text.startswith("source "):
            self.shell.run(text)
            self.shell.activation = text
        elif text == "make test":
            self.shell.run("make --dry-run test")
        elif text == "fls ui":
            self.shell.run_until(text, r"http://\S+", _open)
        elif text == "fls resume last":
            self.shell.run_until("fls run pipeline.yaml --set finetune.epochs=11", r"\d+ done")
            expect("done" in self.shell.run(text), "the resumed run is not done")
        elif text.startswith("RAY_ADDRESS="):
            self._on_a_cluster(text)
        elif text.startswith("fls submit"):
            self._submit(text)
        elif not text.startswith("pip install"):  # see wheel.py
            self._check(text, self.shell.run(text.replace("STAGE", "pretrain")))

    def code(self, text: str) -> None:
        """Run a block of Python in the clone's environment, on a network of torchvision."""
        block = self.shell.folder / "build" / "block.py"
        block.parent.mkdir(exist_ok=True)
        block.write_text(text, encoding="utf-8")
        python = ".venv/bin/python -W error"
        self.shell.run(f"{python} -m tests.acceptance.three_lines mobilenet_v3_small {block}")

    def _check(self, text: str, output: str) -> None:
        """Check that a command has shown what the README says of it."""
        if text in {"make run", "fls results pipeline.yaml"}:
            expect("eigen" in output, f"{text}: its output has no row `eigen`\n{output}")
        if text.startswith("fls export"):
            expect("model.safetensors" in output, f"{text}: no weights\n{output}")

    def _on_a_cluster(self, text: str) -> None:
        """Run the README's example of a cluster on this machine, and small."""
        head, mlflow = self._start()
        data = self._noise()
        for name, value in {"ray-head:6379": head.gcs, "http://mlflow:5000": mlflow}.items():
            expect(name in text, f"{name} is not in {text!r}")
            text = text.replace(name, value)
        small = "".join(f" --set '{one}'" for one in _SMALL.split())
        output = self.shell.run(f"{text}{small}", shown=text, FISHLEG_DATA=str(data))
        expect("| fishleg " in output, f"no row of fishleg in\n{output}")

    def _submit(self, text: str) -> None:
        head, _ = self._start()
        address = "http://ray-head:8265"
        expect(address in text, f"{address} is not in {text!r}")
        output = self.shell.run(text.replace(address, head.address))
        expect("| fishleg " in output, f"no row of fishleg in\n{output}")

    def _start(self) -> tuple[Head, str]:
        """Return a Ray head and the address of an MLflow server; the first call starts them."""
        if self._servers is None:
            with step("start a Ray head and an MLflow server on 127.0.0.1"):
                enter = self._stack.enter_context
                folder = Path(enter(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
                path = f"{self.shell.folder}/.venv/bin:{self.shell.variables['PATH']}"
                head = enter(
                    start_head(
                        "--num-cpus=2", PATH=path, PYTHONPATH="", RAY_AUTH_TOKEN=token_hex(16)
                    )
                )
                database = f"sqlite:///{folder}/mlflow.db"
                self._servers = head, enter(mlflow_server(database, folder))
            token = {n: v for n, v in head.environment.items() if n.startswith("RAY_")}
            self.shell.variables = {**self.shell.variables, **token}
        return self._servers

    def _noise(self) -> Path:
        """Return a data folder with a small CIFAR-10 of noise, in its binary form."""
        data = self.shell.folder / "data"
        folder = data / "cifar-10-batches-bin"
        folder.mkdir(parents=True)
        noise = random.Random(0)  # noqa: S311 - images
        for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
            rows = [bytes([i % 10]) + noise.randbytes(3072) for i in range(_NOISE_IMAGES)]
            (folder / f"{name}.bin").write_bytes(b"".join(rows))
        return data


def _open(link: str) -> None:
    """Open the link that `fls ui` prints, as a browser does."""
    found = re.fullmatch(r"http://(fls:[\w-]+)@(127\.0\.0\.1:\d+)/\S*", link)
    if found is None:
        sys.exit(f"FAILED: fls ui: {link!r} is no link with a password")
    login = base64.b64encode(found[1].encode()).decode()
    request = urllib.request.Request(  # noqa: S310 - our own server
        f"http://{found[2]}/", headers={"Authorization": f"Basic {login}"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        expect(b"<html" in answer.read(), "fls ui: the link leads to no page")


def expect(holds: bool, otherwise: str) -> None:
    """End the program with an error unless a condition holds."""
    if not holds:
        print(f"FAILED: {otherwise}", file=sys.stderr, flush=True)
        sys.exit(1)
