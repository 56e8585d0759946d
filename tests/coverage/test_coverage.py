from __future__ import annotations

import pytest

from tests.coverage.__main__ import PAGE
from tests.coverage.layers import LAYERS, PARAMETRISED, layers_with_parameters, measure_layer
from tests.coverage.measure import Coverage
from tests.coverage.networks import NETWORKS, QUICK, measure_network


def assert_covered(found: Coverage) -> None:
    """The network is right in all respects, and docs/coverage.md says of it what was found."""
    assert found.curvature == "equal"
    assert found.roundtrip in {"equal", "nothing to prune"}
    assert found.line() in PAGE.read_text().splitlines(), "run `python -m tests.coverage`"


def test_the_table_has_every_layer_of_torch_with_parameters():
    assert layers_with_parameters() == set(LAYERS)


@pytest.mark.parametrize("name", [*LAYERS, *PARAMETRISED])
def test_a_layer_of_torch_is_covered(name: str):
    assert_covered(measure_layer(name))


@pytest.mark.parametrize("name", QUICK)
def test_a_network_of_torchvision_is_covered(name: str):
    assert_covered(measure_network(name))


def test_every_network_on_the_page_is_covered():
    page = PAGE.read_text().splitlines()
    for name in NETWORKS:
        cells = next(line for line in page if line.startswith(f"| `{name}` ")).split(" | ")
        assert cells[2] == "equal" and cells[5].rstrip(" |") == "equal", name
