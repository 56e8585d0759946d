import pytest
import torch
from torch import nn

from fishleg.calibration import Calibration
from fishleg.errors import FishLegError, ShapeMismatch, UnknownName
from fishleg.fisher import fisher_vector_product
from fishleg.gradients.source import GradientSource
from fishleg.likelihoods import Gaussian
from fishleg.parameters import partition_parameters
from tests.fishleg.networks import (
    Attention,
    Tied,
    mixed_source,
    reference_groups,
    shake,
    source_of,
)
from tests.reference import dense_fisher, flat_vector, gaussian_hessian, sample_gradients

EXACT = {"rtol": 1e-10, "atol": 1e-10}
# The sampled product over this many labels an input, and its allowed relative error: about five
# times the standard deviation of 1 / sqrt(6 samples x 2000 draws) at the spread of these gradients.
MONTE_CARLO_DRAWS = 2000
MONTE_CARLO_ERROR = 0.1


def random_vector(source: GradientSource) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        for name, parameter in source.model.named_parameters()
    }


def dense_product(source: GradientSource, fisher: torch.Tensor, v: dict) -> torch.Tensor:
    return fisher @ flat_vector(v, reference_groups(source.partition))


def flat_product(source: GradientSource, v: dict, form: str) -> torch.Tensor:
    product = fisher_vector_product(source, v, form=form)
    return flat_vector(product, reference_groups(source.partition))


def tied_source() -> GradientSource:
    torch.manual_seed(0)
    return source_of(shake(Tied()), Calibration(inputs=torch.randn(5, 4, dtype=torch.float64)))


def attention_source() -> GradientSource:
    torch.manual_seed(0)
    model = shake(Attention(batch_first=True))
    return source_of(model, Calibration(inputs=torch.randint(7, (4, 5))))


@pytest.mark.parametrize("make", [mixed_source, tied_source, attention_source])
def test_exact_is_enumerated_is_dense(make):
    source = make()
    source.batch_size = 4
    v = random_vector(source)
    groups = reference_groups(source.partition)
    fisher = dense_fisher(source.model, source.calibration.inputs, groups)
    expected = dense_product(source, fisher, v)
    for form in ("exact", "enumerated"):
        torch.testing.assert_close(flat_product(source, v, form), expected, **EXACT)


def test_gaussian():
    model = shake(nn.Linear(3, 2))
    inputs = torch.randn(5, 3, dtype=torch.float64)
    partition = partition_parameters(model)
    source = GradientSource(model, Gaussian(0.5), partition, Calibration(inputs=inputs))
    v = random_vector(source)
    fisher = dense_fisher(
        model, inputs, [("weight", "bias")], lambda outputs: gaussian_hessian(outputs, 0.5)
    )
    for form in ("exact", "enumerated"):
        torch.testing.assert_close(
            flat_product(source, v, form), dense_product(source, fisher, v), **EXACT
        )


def test_sampled_is_the_sum_over_the_streamed_gradients():
    # Not v (g . v), nor the product of batch means: each would differ here.
    source = mixed_source(draws=3)
    v = random_vector(source)
    held = source.hold(source.partition.names)
    rows = torch.cat([held[name].flatten(1) for name in source.partition.names], dim=1)
    expected = dense_product(source, rows.T @ rows, v)
    torch.testing.assert_close(flat_product(source, v, "sampled"), expected, **EXACT)


def test_sampled_does_not_depend_on_the_batching():
    v = random_vector(mixed_source())
    whole = flat_product(mixed_source(batch_size=100), v, "sampled")
    parts = flat_product(mixed_source(batch_size=1), v, "sampled")
    torch.testing.assert_close(parts, whole, **EXACT)


def test_sampled_converges_to_exact():
    source = mixed_source(draws=MONTE_CARLO_DRAWS)
    v = random_vector(source)
    exact, sampled = (flat_product(source, v, form) for form in ("exact", "sampled"))
    assert (sampled - exact).norm() < MONTE_CARLO_ERROR * exact.norm()


def test_empirical_is_the_sum_over_the_data_gradients():
    source = mixed_source()
    v = random_vector(source)
    data, groups = source.calibration, reference_groups(source.partition)
    rows = sample_gradients(source.model, source.likelihood.nll, data.inputs, data.targets, groups)
    expected = dense_product(source, rows.T @ rows / len(data), v)
    torch.testing.assert_close(flat_product(source, v, "empirical"), expected, **EXACT)


def test_parameters_that_are_not_named_are_fixed():
    source = mixed_source()
    v = random_vector(source)
    named = {name: v[name] for name in ("conv.weight", "head.bias")}
    padded = {name: named.get(name, torch.zeros_like(value)) for name, value in v.items()}
    some, whole = (fisher_vector_product(source, vector) for vector in (named, padded))
    assert list(some) == list(named)
    for name, value in some.items():
        torch.testing.assert_close(value, whole[name], **EXACT)


def test_float32_holds_without_finite_differences():
    double, single = mixed_source(), mixed_source(dtype=torch.float32)
    single.calibration.inputs.copy_(double.calibration.inputs)
    single.model.load_state_dict(double.model.state_dict())
    v = random_vector(double)
    exact = flat_product(double, v, "exact")
    found = flat_product(single, {name: value.float() for name, value in v.items()}, "exact")
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 1e-5 * exact.norm()


def test_model_and_vector_are_left_as_they_were():
    source = mixed_source()
    source.model.train()
    v = random_vector(source)
    state = {name: tensor.clone() for name, tensor in source.model.state_dict().items()}
    copies = {name: tensor.clone() for name, tensor in v.items()}
    product = fisher_vector_product(source, v)
    assert source.model.training
    for name, tensor in source.model.state_dict().items():
        assert torch.equal(tensor, state[name])
    for name, tensor in v.items():
        assert torch.equal(tensor, copies[name])
        assert not product[name].requires_grad


def test_a_tied_parameter_goes_by_each_of_its_names():
    source = tied_source()
    v = torch.randn(4, 4, dtype=torch.float64)
    (one,) = fisher_vector_product(source, {"first.weight": v}).values()
    (other,) = fisher_vector_product(source, {"second.weight": v}).values()
    torch.testing.assert_close(one, other, **EXACT)
    with pytest.raises(ShapeMismatch, match="second.weight and first.weight are one tied"):
        fisher_vector_product(source, {"first.weight": v, "second.weight": v})


def test_what_is_not_finite_is_said_with_its_sample():
    source = mixed_source()
    v = random_vector(source)
    source.calibration.inputs[4] = torch.inf
    with pytest.raises(FishLegError, match="outputs of sample 4: .*Its inputs are not"):
        fisher_vector_product(source, v)
    with pytest.raises(FishLegError, match="others for mix, .*Look for a v that is not"):
        fisher_vector_product(mixed_source(), v | {"head.bias": torch.full((3,), torch.nan)})


def test_arguments_are_checked():
    source = mixed_source()
    with pytest.raises(UnknownName, match="did you mean 'head.bias'"):
        fisher_vector_product(source, {"haed.bias": torch.zeros(3)})
    with pytest.raises(ShapeMismatch, match=r"head.bias: expected \(3,\)"):
        fisher_vector_product(source, {"head.bias": torch.zeros(4)})
    with pytest.raises(UnknownName, match="form"):
        fisher_vector_product(source, {}, form="finite")
