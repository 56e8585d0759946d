"""No mutation of a stored document leads anywhere: all of them, of which `make test` tries some."""

import os
import subprocess
import sys

from tests.faults.ledger import ROOT


def test_no_mutation_of_a_document_leads_anywhere() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "tests/pipeline/test_hostile_documents.py"]
    environment = {**os.environ, "FISHLEG_TEST_MUTATIONS": "12"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
