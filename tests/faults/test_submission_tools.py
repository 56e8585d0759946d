"""Every way to submit to a real Ray head, and what stages may ask of its nodes."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray_heads import ROOT, SEVERAL_NODES, Head, free_ports, start_head, start_node
from test_packing import git
from toy_runs import DIAMOND, TOY, last_run, numbers, wait_for, write_spec

from pipeline.base.states import RunState
from pipeline.code.provenance import Provenance
from pipeline.store.store import Store

SHEBANG = "#!/usr/bin/env -S python -m pipeline run\n"
SSHD = shutil.which("sshd", path="/usr/sbin:/usr/bin:/sbin")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Two nodes; the second says that it has two GPUs, which are not there but are counted."""
    gpus = ["--num-gpus=2", '--resources={"accelerator_type:A100": 2}']
    with (
        start_head("--num-cpus=1", **SEVERAL_NODES) as found,
        start_node(found, "--num-cpus=1", *gpus),
    ):
        yield found


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh working directory with the plugin `toy`, as the user's own would be."""
    shutil.copytree(TOY, tmp_path / "toy", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def submit(head: Head, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", "submit", "--address", head.address, "--follow"]
    return run(head, *command, "--tracking", "jsonl", *arguments)


def run(head: Head, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=head.environment, capture_output=True, text=True, timeout=240
    )


def test_rays_own_command_runs_the_file_itself(head: Head, work: Path) -> None:
    path = write_spec(DIAMOND, storage=str(work / "results"))
    path.write_text(SHEBANG + path.read_text())
    path.chmod(0o755)
    done = run(
        head, "ray", "job", "submit", "--address", head.address, "--working-dir", ".",
        "--", "./pipeline.yaml", "--tracking", "jsonl",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert numbers("results")["add[amount=2,seed=1]"] == 13
    assert "| start[seed=0] | 10 |" in done.stdout


def test_rays_launcher_submits_over_ssh(head: Head, work: Path, tmp_path_factory) -> None:
    write_spec(DIAMOND)
    Path("committed.env").write_text("PASSWORD=5entinel\n")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    git("remote", "add", "origin", "https://me:5entinel@example.com/x.git")
    Path("deploy").mkdir()
    Path("deploy/fishleg.env").write_text("PASSWORD=5entinel\n")
    folder = tmp_path_factory.mktemp("ssh")
    with _sshd(folder, head) as address:
        cluster = yaml.safe_load((ROOT / "deploy" / "cluster.yaml").read_text())
        cluster |= {
            "cluster_name": f"fishleg-{os.getpid()}",
            "provider": {"type": "local", "head_ip": address, "worker_ips": []},
            "auth": {"ssh_user": "root", "ssh_private_key": str(folder / "key")},
            # The environment and the cluster are there already.
            "file_mounts": {"~/fishleg-surgeon": "."},
            "setup_commands": ["true"],
            "head_start_ray_commands": ["true"],
            "worker_start_ray_commands": ["true"],
        }
        (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster))
        up = run(head, "ray", "up", "-y", "--no-config-cache", str(folder / "cluster.yaml"))
        assert up.returncode == 0, up.stdout + up.stderr
        done = run(
            head, "ray", "submit", "--no-config-cache", str(folder / "cluster.yaml"),
            str(ROOT / "deploy" / "submit.py"), "--", "pipeline.yaml", "--tracking", "jsonl",
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| start[seed=0] | 10 |" in done.stdout
    copy = folder / "home" / "fishleg-surgeon"
    storage = str(copy / ".fls")
    assert last_run(storage).state is RunState.DONE
    source = Store(storage).read_run(last_run(storage).run_id, Provenance)
    assert source is not None
    assert (len(source.commit or ""), source.changes) == (40, [])
    # What holds passwords stayed here, and is named as far as Git knows it.
    assert source.left_out == ["committed.env"]
    files = [path for path in copy.rglob("*") if path.is_file()]
    assert copy / "pipeline.yaml" in files
    assert not [path for path in files if b"5entinel" in path.read_bytes()]


def test_stages_get_what_they_ask_for(head: Head, work: Path) -> None:
    write_spec(
        """
        share:
          uses: start
          matrix: {seed: [0, 1]}
          params: {value: 1}
          resources: {num_gpus: 0.5, accelerator_type: A100}
        whole: {uses: start, params: {value: 2}, resources: {num_gpus: 2, memory: 100MB}}
        plain: {uses: start, params: {value: 3}}
        """
    )
    done = submit(head)
    assert done.returncode == 0, done.stdout
    store = Store(".fls")
    devices = {
        name: store.manifest(status.key).making["device"]
        for name, status in last_run().cells.items()
    }
    assert devices == {
        "share[seed=0]": "cuda", "share[seed=1]": "cuda", "whole": "cuda", "plain": "cpu",
    }  # fmt: skip


def test_what_no_node_has_is_an_error_at_once(head: Head, work: Path) -> None:
    write_spec(
        """
        fine: {uses: start, params: {value: 1}, resources: {num_gpus: 1}}
        big: {uses: start, params: {value: 1}, resources: {num_gpus: 3}}
        other: {uses: start, params: {value: 1}, resources: {num_gpus: 1, accelerator_type: H100}}
        """
    )
    done = submit(head)
    assert done.returncode == 2, done.stdout
    assert "big asks for num_cpus: 1, num_gpus: 3; no node fits: " in done.stdout
    assert "other asks for num_cpus: 1, num_gpus: 1, accelerator_type: H100; no" in done.stdout
    assert "(1 CPUs, 2 GPUs of type A100, " in done.stdout
    assert "fine asks" not in done.stdout
    assert not Path(".fls/runs").exists()


def test_a_cluster_that_grows_is_waited_for(head: Head, work: Path) -> None:
    path = write_spec(
        "big: {uses: start, params: {value: 1}, resources: {num_gpus: 1, accelerator_type: H100}}"
    )
    path.write_text(path.read_text() + "cluster: {autoscaling: true}\n")
    command = [sys.executable, "-m", "pipeline", "submit", "--address", head.address]
    submitted = run(head, *command, "--tracking", "jsonl")
    submission = submitted.stdout.split()[1]
    wait_for(lambda: list(Path(".fls").glob("runs/*/state.json")), 60)
    log = run(head, "ray", "job", "logs", submission, "--address", head.address)
    assert "accelerator_type: H100; it waits for a node that has it." in log.stdout + log.stderr
    assert last_run().state is RunState.RUNNING
    with start_node(head, "--num-gpus=1", '--resources={"accelerator_type:H100": 1}'):
        wait_for(lambda: last_run().state is RunState.DONE, 120)


@contextlib.contextmanager
def _sshd(folder: Path, head: Head) -> Iterator[str]:
    """Start an sshd on a loopback address of its own; who comes in has a home of his own, too."""
    assert SSHD, "this test wants Debian's openssh-server and rsync"
    (port,) = free_ports(1)
    address = f"127.{1 + port % 250}.{port // 250 % 250}.22"  # Ray's launcher knows port 22 alone
    home = folder / "home"
    home.mkdir(mode=0o700)
    for name in ("host", "key"):
        key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(key, check=True)
    exported = {
        name: value
        for name, value in head.environment.items()
        if name.startswith(("RAY_", "PYTHONPATH", "PATH"))
    } | {"RAY_API_SERVER_ADDRESS": head.address}
    (home / ".bashrc").write_text(
        "".join(f"export {name}={json.dumps(value)}\n" for name, value in exported.items())
    )
    (folder / "config").write_text(
        f"Port 22\nListenAddress {address}\nHostKey {folder / 'host'}\nPidFile none\nUsePAM no\n"
        f"AuthorizedKeysFile {folder / 'key.pub'}\nStrictModes no\nPasswordAuthentication no\n"
        f"PermitRootLogin prohibit-password\nSetEnv HOME={home}\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)  # where Debian's sshd wants to be confined
    with (folder / "sshd.log").open("wb") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "config")], stderr=log)
        try:
            end = time.monotonic() + 10
            while b"Server listening" not in (folder / "sshd.log").read_bytes():
                assert server.poll() is None and time.monotonic() < end
                time.sleep(0.05)
            yield address
        finally:
            server.terminate()
            server.wait()
