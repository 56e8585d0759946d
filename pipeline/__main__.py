"""The command `fls`, also `python -m pipeline`."""

import sys
from importlib.util import find_spec

from pipeline.base.search_path import look_here_last

_LINE_CHARACTERS = 4000
# of the extra `pipeline`: those that the command line imports when it starts
_PACKAGES = ("typer", "rich", "pydantic", "yaml", "pathspec")


def main() -> None:
    """Run the command line; a user's error is one message and an exit code, never a traceback."""
    # Not above: with `python -m`, what lies in the working directory would come first there.
    import traceback

    _require_packages()
    from pipeline.base.errors import PipelineError
    from pipeline.base.secrets import presentable
    from pipeline.base.text import cut
    from pipeline.cli.commands import app
    from pipeline.stage import StageError

    try:
        app()
    except (PipelineError, StageError) as error:
        for line in presentable(str(error)).splitlines():  # it may quote what a store says
            sys.stderr.write(f"{cut(line, _LINE_CHARACTERS)}\n")
        sys.exit(error.exit_code if isinstance(error, PipelineError) else 1)
    except OSError as error:  # the machine's: no such folder, no room, no permission
        place = "" if error.filename is None else f"{error.filename}: "
        sys.stderr.write(f"{presentable(place + (error.strerror or str(error)))}.\n")
        sys.exit(1)
    except Exception:  # a defect of ours; its traceback may quote a URL with a password
        sys.stderr.write(presentable(traceback.format_exc()))
        sys.exit(1)


def _require_packages() -> None:
    """Stop where the library alone is installed, which needs none of the command's packages."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"The command line needs packages that are not installed ({', '.join(missing)}): "
            "pip install 'fishleg-surgeon[pipeline]'.\n"
        )
        sys.exit(2)


if __name__ == "__main__":
    look_here_last()
    main()
