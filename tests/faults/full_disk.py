"""Runs `fls` on a small file system of its own, in a mount namespace: `unshare -rm` starts this.

    python full_disk.py FOLDER

Bounds the folder's `.fls` by a tmpfs of 8 MiB, and fills it up; then a run is to fail with one
message. Then it is emptied, and the run is to go on. Prints JSON: what the command said, each time.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def fls(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "FLS_PATIENCE_S": "2"},
    )
    return {"code": done.returncode, "output": done.stdout, "errors": done.stderr}


def main(folder: Path) -> None:
    storage = folder / ".fls"
    storage.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(storage)], check=True)
    run = ("run", "--executor", "local", "--tracking", "jsonl")
    ballast = storage / "ballast"
    found = {}
    for name, free in (("full from the start", 0), ("full in the middle", 24 * 1024)):
        size = 0
        try:
            with ballast.open("wb", buffering=0) as file:
                while True:
                    size += file.write(bytes(4096))
        except OSError:
            pass
        with ballast.open("r+b") as file:
            file.truncate(max(0, size - free))
        found[name] = fls(*run)
    found["manifests"] = len(list(storage.glob("stages/*/manifest.json")))
    ballast.unlink()
    found["again"] = fls(*run)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
