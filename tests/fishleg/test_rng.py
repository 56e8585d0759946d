import math

import pytest
import torch

from fishleg.rng import SampleGenerator, philox

SAMPLES = 20_000
# Standard errors of the statistics below, times five.
MEAN_ERROR = 5 / math.sqrt(SAMPLES)


def words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # Known answers of the authors' Random123 library, kat_vectors, philox4x32 10.
        (
            (0, 0, 0, 0),
            (0, 0),
            (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    assert tuple(int(word) for word in philox(words(*counter), key)) == expected


@pytest.mark.parametrize("kind", ["uniform", "normal"])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 5)])
def test_bits_do_not_depend_on_the_batching(kind, shape):
    indices = torch.tensor([7, 0, 123, 2**40, 5])
    whole = getattr(SampleGenerator(3, indices, 2), kind)(*shape)
    assert whole.shape == (5, *shape)
    assert whole.dtype == torch.float64
    for position, index in enumerate(indices):
        alone = getattr(SampleGenerator(3, index[None], 2), kind)(*shape)
        assert torch.equal(alone[0], whole[position])


def test_seed_index_and_draw_each_give_other_numbers():
    base = SampleGenerator(1, torch.arange(4), 0).uniform(3)
    for other in (
        SampleGenerator(2, torch.arange(4), 0),
        SampleGenerator(1 + 2**32, torch.arange(4), 0),
        SampleGenerator(1, torch.arange(4, 8), 0),
        SampleGenerator(1, torch.arange(4), 1),
    ):
        assert not (other.uniform(3) == base).any()


def test_successive_calls_go_on_and_a_new_object_starts_over():
    generator = SampleGenerator(0, torch.arange(4))
    first, second = generator.uniform(2), generator.uniform(2)
    assert not (first == second).any()
    again = SampleGenerator(0, torch.arange(4))
    assert torch.equal(again.uniform(2), first)
    assert torch.equal(again.uniform(2), second)


def test_negative_seeds_are_seeds():
    assert SampleGenerator(-1, torch.arange(2)).uniform(1).isfinite().all()


def test_uniform_fills_the_open_interval():
    values = SampleGenerator(0, torch.arange(SAMPLES)).uniform().sort().values
    assert 0 < values[0]
    assert values[-1] < 1
    ideal = (torch.arange(SAMPLES) + 0.5) / SAMPLES
    # Kolmogorov and Smirnov's statistic exceeds 1.95 / sqrt(n) once in a thousand seeds.
    assert (values - ideal).abs().max() < 1.95 / math.sqrt(SAMPLES)


def test_normal_has_the_moments_of_a_normal():
    values = SampleGenerator(0, torch.arange(SAMPLES)).normal()
    assert abs(values.mean()) < MEAN_ERROR
    assert abs(values.square().mean() - 1) < math.sqrt(2) * MEAN_ERROR
    assert abs(values.pow(4).mean() - 3) < math.sqrt(96) * MEAN_ERROR
