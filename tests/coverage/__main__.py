"""Measures everything, and writes docs/coverage.md; checks any number of random networks.

python -m tests.coverage                  # what is not on the page yet; --again for all of it
python -m tests.coverage random 100 2000  # random networks 100 ... 2,099
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.coverage.layers import LAYERS, PARAMETRISED, measure_layer
from tests.coverage.measure import HEADER, Coverage
from tests.coverage.networks import NETWORKS, measure_network
from tests.fishleg.random_networks import random_case
from tests.fishleg.test_random_networks import check

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
_INTRODUCTION = """\
# What is covered

`python -m tests.coverage` makes this page. It measures each layer and network on two samples in float64: the per-sample
gradients, the products of the Fisher with a vector, and the Fisher's diagonal, each compared with a loop over single
samples ("equal": to 1e-8 of the norm). Then it removes half of the prunable weights, saves the network, loads it into a
fresh one, and compares the outputs. `make test` repeats this for the layers and five of the networks, and compares the
results with this page.

The *fast path* computes gradients from the signals of linear, convolution and normalisation layers; the other paths are
slower and equally exact. To prune more than the default, name the weights: `prunable=[...]` of `partition_parameters`,
in a pipeline `also_prune:`.
"""  # noqa: E501 - a paragraph of a page


def lines(names: Iterable[str], one: Callable[[str], Coverage], known: set[str]) -> list[str]:
    """Return the lines of a table; those in `known` are taken from there."""
    found = []
    for name in names:
        line = next((line for line in known if line.startswith(f"| `{name}` ")), None)
        if line is None:
            print(name, file=sys.stderr, flush=True)
            line = one(name).line()
            print(line, file=sys.stderr, flush=True)
        found.append(line)
    return found


def page(known: set[str]) -> str:
    """Return the whole page."""
    parts = [_INTRODUCTION]
    for title, names, one, old in (
        ("Layers of torch.nn", LAYERS, measure_layer, set()),
        ("Parametrised layers", PARAMETRISED, measure_layer, set()),
        ("Networks of torchvision", NETWORKS, measure_network, known),
    ):
        parts.append(f"## {title}\n\n" + HEADER + "\n".join(lines(names, one, old)) + "\n")
    return "\n".join(parts)


def check_random(first: int, count: int) -> int:
    """Check random networks FIRST ... FIRST + COUNT - 1, print those that fail, return how many."""
    failed = 0
    for seed in range(first, first + count):
        case = random_case(seed)
        try:
            check(case)
        except Exception:  # whatever it is, it is a finding
            failed += 1
            print(f"--- network {seed}\n{case.text}\n{traceback.format_exc()}", flush=True)
    print(f"{count} networks, {failed} failed")
    return failed


def main() -> None:
    """Write the page, or check random networks."""
    warnings.simplefilter("ignore")
    if sys.argv[1:2] == ["random"]:
        sys.exit(check_random(*map(int, sys.argv[2:])) > 0)
    known = set(PAGE.read_text().splitlines()) if PAGE.exists() else set()
    PAGE.write_text(page(set() if "--again" in sys.argv[1:] else known))


if __name__ == "__main__":
    main()
