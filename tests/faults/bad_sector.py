"""Puts a file that cannot be read (EIO) into the place of another: `unshare -rm` starts this.

    python bad_sector.py FOLDER FILE -- FLS ARGUMENTS

A process's own memory, bound over the file, is such a file: address 0 cannot be read. Prints JSON:
what `fls` said, whose storage is `.fls` in the folder.
"""

import json
import os
import subprocess
import sys


def main(folder: str, file: str, arguments: list[str]) -> None:
    subprocess.run(["mount", "--bind", f"/proc/{os.getpid()}/mem", file], check=True)
    try:
        with open(file, "rb") as opened:
            opened.read()
        raise AssertionError("the file can be read")
    except OSError:
        pass
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "FLS_PATIENCE_S": "2"},
        cwd=folder,
    )
    found = {"code": done.returncode, "output": done.stdout, "errors": done.stderr}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[4:])
