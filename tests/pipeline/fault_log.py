"""What the fault tests found, a JSON line a case, in the file named by `FLS_FAULTS_OUT`."""

import json
import os
from typing import Any


def record(**case: Any) -> None:
    """Append a case, if anybody wants to know."""
    path = os.environ.get("FLS_FAULTS_OUT")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(case) + "\n")
