"""Which weights are prunable by default, and why the others are not."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from fishleg.errors import FishLegError
from fishleg.parameters import Partition, partition_parameters
from fishleg.parametrised import WHOLE
from fishleg.pruning import group_masks


def prunable(partition: Partition) -> list[str]:
    return [group.weight for group in partition.prunable]


# -------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize(
    ("layer", "weights"),
    [
        (nn.Linear(2, 3), ["weight"]),
        (nn.Bilinear(2, 3, 4), ["weight"]),
        (nn.Conv1d(2, 4, 3), ["weight"]),
        (nn.ConvTranspose1d(2, 4, 3), ["weight"]),
        (nn.ConvTranspose2d(2, 4, 3), ["weight"]),
        (nn.ConvTranspose3d(2, 4, 3), ["weight"]),
        (nn.LSTM(3, 4, proj_size=2), ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]),
        (
            nn.GRU(3, 4, num_layers=2),
            ["weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"],
        ),
        (
            nn.RNN(3, 4, bidirectional=True, bias=False),
            ["weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"],
        ),
        (nn.LSTMCell(3, 4), ["weight_ih", "weight_hh"]),
        (nn.MultiheadAttention(4, 2), ["in_proj_weight", "out_proj.weight"]),
        (
            nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
        ),
        (
            nn.TransformerEncoderLayer(4, 2, 6),
            [
                "self_attn.in_proj_weight",
                "self_attn.out_proj.weight",
                "linear1.weight",
                "linear2.weight",
            ],
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_weights_of_layers_are_prunable(layer, weights):
    partition = partition_parameters(layer)
    assert prunable(partition) == weights
    assert partition.unprunable == ()


def test_a_convolutional_autoencoder_is_prunable_throughout():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3), nn.ConvTranspose2d(4, 1, 3)
    )
    assert prunable(partition_parameters(model)) == ["0.weight", "2.weight", "3.weight"]


class Odd(nn.Module):
    """Weights that are not pruned, each for another reason."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(5, 4))
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm((5, 4))
        self.kept = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4)
        self.frozen.weight.requires_grad_(False)
        self.skipped = nn.Linear(4, 4)
        self.rotation = parametrizations.orthogonal(nn.Linear(4, 4))
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.register_buffer("table", torch.zeros(3, 3))
        self.head = nn.Linear(4, 3)


def test_every_weight_that_is_not_prunable_is_listed_with_the_reason():
    partition = partition_parameters(Odd(), keep=["kept.*"], skip=["skipped.weight"])
    assert prunable(partition) == ["head.weight"]
    assert dict(partition.unprunable) == {
        "position": "position of Odd, no weight of a known layer; prunable when named",
        "embed.weight": "an embedding; prunable when named",
        "norm.weight": "weight of LayerNorm, no weight of a known layer; prunable when named",
        "norm.bias": "bias of LayerNorm, no weight of a known layer; prunable when named",
        "kept.weight": "kept dense on request",
        "frozen.weight": "frozen: requires_grad is False",
        "skipped.weight": "skipped on request",
        "rotation.parametrizations.weight.original": (
            "makes rotation.weight by Orthogonal, where its zeros do not stay zeros in their places"
        ),
        "empty": "no entries",
    }


def test_what_is_listed_as_prunable_when_named_is():
    model = Odd()
    for name, reason in partition_parameters(model).unprunable:
        if reason.endswith("prunable when named"):
            assert name in prunable(partition_parameters(model, prunable=[name]))
        else:
            with pytest.raises(FishLegError, match=f"names no weight that can be pruned: {name}"):
                partition_parameters(model, prunable=[name])


def test_a_lazy_layer_is_refused_by_name():
    with pytest.raises(FishLegError, match="1.weight has no shape yet"):
        partition_parameters(nn.Sequential(nn.ReLU(), nn.LazyLinear(3)))


def test_the_nearest_name_is_offered():
    with pytest.raises(FishLegError, match=r"did you mean 'head.weight'\?"):
        partition_parameters(Odd(), keep=["heads.weight"])


def test_a_name_is_no_pattern_first():
    model = nn.ParameterDict({"w[0]": torch.zeros(2, 2), "w0": torch.zeros(2, 2)})
    assert prunable(partition_parameters(model, prunable=["w[0]"])) == ["w0", "w[0]"]
    del model["w0"]
    assert prunable(partition_parameters(model, prunable=["w[0]"])) == ["w[0]"]


# ---------------------------------------------------------------------------------------- ties


class Language(nn.Module):
    """An embedding tied to the head, registered in either order."""

    def __init__(self, *, embedding_first: bool) -> None:
        super().__init__()
        for name in ("embed", "head") if embedding_first else ("head", "embed"):
            layer = nn.Embedding(7, 4) if name == "embed" else nn.Linear(4, 7)
            self.add_module(name, layer)
        self.head.weight = self.embed.weight
        self.hidden = nn.Linear(4, 4)


@pytest.mark.parametrize("embedding_first", [True, False])
def test_a_tied_embedding_is_dense_whichever_is_registered_first(embedding_first):
    model = Language(embedding_first=embedding_first)
    partition = partition_parameters(model)
    assert prunable(partition) == ["hidden.weight"]
    ((name, reason),) = partition.unprunable
    assert name == ("embed.weight" if embedding_first else "head.weight")
    assert "embedding" in reason
    (tied,) = [group for group in partition.groups if group.weight == name]
    assert sorted(tied.names) == ["embed.weight", "head.weight"]
    assert tied.names[0] == name
    assert tied.bias == "head.bias"


@pytest.mark.parametrize("embedding_first", [True, False])
@pytest.mark.parametrize("name", ["embed.weight", "head.weight", "he*.weight"])
def test_each_name_of_a_tied_weight_works(embedding_first, name):
    model = Language(embedding_first=embedding_first)
    named = partition_parameters(model, prunable=[name])
    assert [group.names for group in named.prunable][:1] == [
        ("embed.weight", "head.weight") if embedding_first else ("head.weight", "embed.weight")
    ]
    kept = partition_parameters(model, prunable=["embed.weight"], keep=[name])
    assert dict(kept.unprunable) == {named.prunable[0].weight: "kept dense on request"}
    skipped = partition_parameters(model, skip=[name])
    assert [why for _, why in skipped.uncovered] == ["skipped on request"]


def test_two_tied_layers_are_prunable_and_a_mask_goes_by_either_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    partition = partition_parameters(model)
    assert [group.names for group in partition.prunable] == [("0.weight", "1.weight")]
    mask = torch.eye(4).bool()
    for names in (["1.weight"], ["0.weight"], ["0.weight", "1.weight"]):
        masks = group_masks(partition, dict.fromkeys(names, mask))
        assert torch.equal(masks["0"][:, :4], mask)
    with pytest.raises(FishLegError, match="1.weight is another name of 0.weight"):
        group_masks(partition, {"0.weight": mask, "1.weight": ~mask})


def test_a_module_that_is_registered_twice_has_both_names():
    layer = nn.Linear(4, 4)
    partition = partition_parameters(nn.ModuleDict({"a": layer, "b": layer}), keep=["b.weight"])
    assert prunable(partition) == []
    assert partition["a"].names == ("a.weight", "b.weight")
    assert partition["a"].bias == "a.bias"


# -------------------------------------------------------------------------------------- biases


def test_a_bias_of_the_outputs_is_no_column_of_a_transposed_weight():
    partition = partition_parameters(nn.ModuleList([nn.ConvTranspose2d(4, 4, 3, groups=2)]))
    assert [group.name for group in partition.groups] == ["0", "0.bias"]
    assert partition["0"].shape == (4, 18)
    assert partition["0"].transposed
    assert partition["0"].conv_groups == 2


def test_a_bilinear_weight_has_its_bias():
    (group,) = partition_parameters(nn.Bilinear(2, 3, 4)).groups
    assert (group.shape, group.bias) == ((4, 7), "bias")


# ------------------------------------------------------------------------------ parametrised


class Absolute(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


class Shifted(nn.Module):
    """Zeros survive only as long as the shift is 0, as it is at first."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class UnitRows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=1, keepdim=True)


class LowRank(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return w[:, :2].clone(), w[:2].clone()


class Gated(nn.Module):
    """Two tensors of the weight's own shape, of which both bring zeros."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return w.clone(), torch.ones_like(w)


class Failing(nn.Module):
    """Takes the numbers that it was made with, and no others."""

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and x.std() > 0.6:
            raise RuntimeError("out of range")
        return x


def custom(part: nn.Module) -> nn.Module:
    layer = nn.Linear(4, 5)
    if isinstance(part, Symmetric):
        layer = nn.Linear(4, 4)
    return parametrize.register_parametrization(layer, "weight", part, unsafe=True)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("layer", "stored", "norm_dim"),
    [
        (lambda: parametrizations.weight_norm(nn.Linear(4, 5)), "original1", None),
        (lambda: parametrizations.weight_norm(nn.Linear(4, 5), dim=None), "original1", None),
        (lambda: parametrizations.spectral_norm(nn.Linear(4, 5)), "original", WHOLE),
        (lambda: nn.utils.weight_norm(nn.Linear(4, 5)), "weight_v", None),
        (lambda: nn.utils.spectral_norm(nn.Linear(4, 5)), "weight_orig", WHOLE),
        (lambda: prune.l1_unstructured(nn.Linear(4, 5), "weight", 0.3), "weight_orig", None),
        (lambda: custom(Absolute()), "original", None),
        (lambda: custom(UnitRows()), "original", 0),
        (lambda: custom(Gated()), "original0", None),
    ],
    ids=["weight_norm", "whole", "spectral", "old", "old_spectral", "prune", "abs", "unit", "gate"],
)
def test_the_stored_tensor_whose_zeros_survive_is_prunable(layer, stored, norm_dim):
    generator = torch.get_rng_state()
    module = layer()
    torch.set_rng_state(generator)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    partition = partition_parameters(module)
    (group,) = partition.prunable
    assert group.weight.rpartition(".")[2] == stored
    assert (group.name, group.used, group.bias) == ("weight", "weight", "bias")
    assert group.norm_dim == norm_dim
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: parametrizations.orthogonal(nn.Linear(4, 5)),
        lambda: custom(Symmetric()),
        lambda: custom(Shifted()),
        lambda: custom(LowRank()),
        lambda: custom(Failing()),
    ],
    ids=["orthogonal", "symmetric", "shifted", "low_rank", "failing"],
)
def test_a_weight_whose_zeros_do_not_survive_is_not_prunable_and_says_so(layer):
    partition = partition_parameters(layer())
    assert partition.prunable == ()
    assert partition.unprunable
    for _, reason in partition.unprunable:
        assert "makes weight by" in reason
        assert "zeros do not stay" in reason


def test_what_else_a_parametrised_weight_is_made_of_is_listed():
    partition = partition_parameters(parametrizations.weight_norm(nn.Conv2d(2, 3, 3)))
    assert partition.unprunable == (
        (
            "parametrizations.weight.original0",
            "makes weight by WeightNorm, whose zeros are those of "
            "parametrizations.weight.original1",
        ),
    )


def test_a_parametrised_weight_goes_by_the_name_of_what_it_makes():
    model = nn.ModuleDict({"a": parametrizations.weight_norm(nn.Linear(3, 3))})
    partition = partition_parameters(model, keep=["a.weight"])
    assert partition.prunable == ()
    assert ("a.parametrizations.weight.original1", "kept dense on request") in partition.unprunable


def test_parametrised_recurrent_weights_are_prunable():
    layer = parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    assert [group.used for group in partition_parameters(layer).prunable] == [
        "weight_ih_l0",
        "weight_hh_l0",
    ]
