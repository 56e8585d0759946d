"""One suite for all blocks. A new block is one line in `CASES`: how to make it, and its Q."""

from collections.abc import Callable

import pytest
import torch

from fishleg.blocks import (
    BLOCKS,
    AbstractBlock,
    DenseBlock,
    DiagonalBlock,
    EigenBlock,
    GramBlock,
    KroneckerBlock,
    LowRankBlock,
    SharedBlock,
    TensorBlock,
)
from fishleg.blocks.eigen import invert_factors
from fishleg.blocks.low_rank import invert_low_rank
from fishleg.errors import NotPositiveDefinite, ShapeMismatch
from fishleg.linalg import invert_damped

TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
}
Case = tuple[AbstractBlock, torch.Tensor]


def positive(*shape: int) -> torch.Tensor:
    return 0.5 + torch.rand(*shape, dtype=torch.float64)


def spd(n: int) -> torch.Tensor:
    root = torch.randn(n, n, dtype=torch.float64)
    return root @ root.T / n + 0.5 * torch.eye(n, dtype=torch.float64)


def orthogonal(n: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q


def scaled(dense: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return scale.flatten()[:, None] * dense * scale.flatten()


def diagonal() -> Case:
    values = positive(3, 4)
    return DiagonalBlock(values), torch.diag(values.flatten())


def dense(shape: tuple[int, int], size: int) -> Case:
    count = -(-shape[0] * shape[1] // size)
    matrices = [spd(size) for _ in range(count)]
    left = shape[0] * shape[1] - (count - 1) * size
    expected = torch.block_diag(*matrices[:-1], matrices[-1][:left, :left])
    return DenseBlock(torch.stack(matrices), shape), expected


def eigen(conv_groups: int) -> Case:
    left = torch.stack([orthogonal(3) for _ in range(conv_groups)])
    right = torch.stack([orthogonal(4) for _ in range(conv_groups)])
    values = positive(conv_groups, 3, 4)
    bases = [torch.kron(u, w) for u, w in zip(left, right, strict=True)]
    parts = [b @ torch.diag(s.flatten()) @ b.T for b, s in zip(bases, values, strict=True)]
    return EigenBlock(left, right, values), torch.block_diag(*parts)


def kronecker(*, scale: bool) -> Case:
    b, c = spd(3), spd(4)
    a = positive(3, 4) if scale else torch.ones(3, 4, dtype=torch.float64)
    return KroneckerBlock(b, c, a if scale else None), scaled(torch.kron(b, c), a)


def tensor(*, scale: bool, bias: bool) -> Case:
    out, inner, kernel = spd(3), spd(2), spd(4)
    extra = positive(1) if bias else None
    columns = torch.kron(inner, kernel)
    if extra is not None:
        columns = torch.block_diag(columns, extra[:, None])
    a = positive(3, len(columns)) if scale else torch.ones(3, len(columns), dtype=torch.float64)
    block = TensorBlock(out, inner, kernel, extra, a if scale else None)
    return block, scaled(torch.kron(out, columns), a)


def shared(conv_groups: int) -> Case:
    matrices = [spd(4) for _ in range(conv_groups)]
    parts = [torch.kron(torch.eye(3, dtype=torch.float64), matrix) for matrix in matrices]
    return SharedBlock(torch.stack(matrices), (3 * conv_groups, 4)), torch.block_diag(*parts)


def woodbury(count: int) -> Case:
    gradients = torch.randn(count, 3, 4, dtype=torch.float64)
    flat = gradients.flatten(1)
    damped = 2.0 * torch.eye(12, dtype=torch.float64) + flat.T @ flat
    return invert_low_rank(gradients, 2.0), torch.linalg.inv(damped)


def gram(count: int) -> Case:
    gradients = torch.randn(count, 3, 4, dtype=torch.float64)
    flat = gradients.flatten(1)
    damping = torch.tensor(2.0, dtype=torch.float64)
    return GramBlock(gradients, damping), 2.0 * torch.eye(12, dtype=torch.float64) + flat.T @ flat


CASES: dict[str, Callable[[], Case]] = {
    "diagonal": diagonal,
    "dense, whole chunks": lambda: dense((3, 4), 4),
    "dense, padded": lambda: dense((3, 5), 4),
    "dense, one chunk": lambda: dense((3, 4), 12),
    "dense, chunks of one": lambda: dense((3, 2), 1),
    "eigen": lambda: eigen(1),
    "eigen, grouped": lambda: eigen(3),
    "gram": lambda: gram(5),
    "kronecker": lambda: kronecker(scale=False),
    "kronecker, scaled": lambda: kronecker(scale=True),
    "shared": lambda: shared(1),
    "shared, grouped": lambda: shared(2),
    "woodbury": lambda: woodbury(5),
    "woodbury, more gradients than weights": lambda: woodbury(20),
    "tensor": lambda: tensor(scale=False, bias=False),
    "tensor, scaled": lambda: tensor(scale=True, bias=False),
    "tensor, bias": lambda: tensor(scale=False, bias=True),
    "tensor, scaled, bias": lambda: tensor(scale=True, bias=True),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def float64_case(request) -> Case:
    torch.manual_seed(0)
    return request.param()


@pytest.fixture(params=[torch.float64, torch.float32], ids=str)
def case(request, float64_case) -> Case:
    block, expected = float64_case
    tensors = {name: value.to(request.param) for name, value in block.tensors().items()}
    return type(block).restore(tensors, block.shape), expected.to(request.param)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, **TOLERANCE[expected.dtype])


def test_dense_is_the_equation(case):
    block, expected = case
    close(block.dense(), expected)


def test_symmetric_and_positive_definite(case):
    found = case[0].dense()
    close(found, found.T)
    assert torch.linalg.eigvalsh(found.double()).min() > 0


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (0,)])
def test_matvec(case, lead):
    block, expected = case
    v = torch.randn(*lead, *block.shape, dtype=expected.dtype)
    close(block.matvec(v), (v.flatten(-2) @ expected.T).reshape(v.shape))


def test_matvec_takes_views(case):
    block, expected = case
    v = torch.randn(block.shape[1], block.shape[0], 2, dtype=expected.dtype).permute(2, 1, 0)
    close(block.matvec(v), (v.flatten(-2) @ expected.T).reshape(v.shape))


def test_diagonal_and_trace(case):
    block, expected = case
    close(block.diagonal(), expected.diagonal().reshape(block.shape))
    close(block.trace(), expected.trace())


def test_log_det(case):
    block, expected = case
    close(block.log_det(), torch.linalg.slogdet(expected)[1])


def test_submatrix(case):
    block, expected = case
    size = len(expected)
    one = torch.randperm(size)[:5]
    many = torch.stack([torch.randperm(size)[:3] for _ in range(8)]).reshape(2, 4, 3)
    everything = torch.arange(size)
    for index in (one, many, everything, one[:1], one[:0]):
        close(block.submatrix(index), expected[index[..., :, None], index[..., None, :]])


def test_rows(case):
    block, dense = case
    rows = torch.tensor([block.shape[0] - 1, 0])
    columns = torch.arange(block.shape[1])
    expected = torch.stack(
        [dense[index][:, index] for index in rows.unsqueeze(1) * block.shape[1] + columns]
    )
    torch.testing.assert_close(block.of_rows(rows), expected, **TOLERANCE[expected.dtype])


def test_rows_at_some_columns(case):
    block, _ = case
    rows, columns = torch.tensor([block.shape[0] - 1, 0]), torch.arange(block.shape[1])[-2:]
    whole = block.of_rows(rows)
    close(block.of_rows(rows, columns), whole[:, -2:, -2:])
    each = torch.stack([columns, columns.flip(0)])
    expected = torch.stack([whole[0, -2:, -2:], whole[1, -2:, -2:].flip(0, 1)])
    close(block.of_rows(rows, each), expected)


def test_inverse_rows_at_some_columns(float64_case):
    block, _ = float64_case
    rows = torch.tensor([block.shape[0] - 1, 0])
    each = torch.arange(block.shape[1])[-2:].flip(0).expand(2, -1)
    expected = torch.linalg.inv(block.of_rows(rows))[:, -2:, -2:].flip(1, 2)
    close(block.invert_rows(rows, each), expected)


def test_runs_of_rows_are_not_coupled(case):
    block, dense = case
    assert block.shape[0] % block.row_runs == 0
    run = torch.arange(block.shape[0]) * block.row_runs // block.shape[0]
    run = run.repeat_interleave(block.shape[1])
    assert (dense[run[:, None] != run] == 0).all()


def test_invert(case):
    block, dense = case
    inverse = block.invert()
    assert inverse.shape == block.shape
    found = inverse.dense()
    assert found.dtype == dense.dtype
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dense.dtype == torch.float64 else {"atol": 1e-3}
    error = found @ dense - torch.eye(len(dense), dtype=dense.dtype)
    torch.testing.assert_close(error, torch.zeros_like(error), **{"rtol": 0.0, **tolerance})


@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_resolvent(case, lead):
    block, dense = case
    apply = block.resolvent()
    v = torch.randn(*lead, *block.shape, dtype=dense.dtype)
    eye = torch.eye(len(dense), dtype=torch.float64)
    iterates = getattr(block, "scale", None) is not None
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if iterates else TOLERANCE[dense.dtype]
    for rho in (0.0, 0.3, 10.0):
        expected = torch.linalg.inv(torch.linalg.inv(dense.double()) + rho * eye).to(dense)
        found = apply(v, rho)
        assert found.dtype == dense.dtype
        wanted = (v.flatten(-2) @ expected.T).reshape(v.shape)
        torch.testing.assert_close(found, wanted, **tolerance)


def test_double_is_the_same_block_in_float64(case):
    block, dense = case
    assert block.double().dense().dtype == torch.float64
    close(block.double().dense().to(dense.dtype), dense)


def test_nothing_passed_in_is_modified(case):
    block, expected = case
    v = torch.randn(*block.shape, dtype=expected.dtype)
    before = [tensor.clone() for tensor in (v, *block.tensors().values())]
    block.matvec(v).zero_()
    block.diagonal().zero_()
    block.submatrix(torch.arange(3)).zero_()
    block.trace()
    after = [v, *block.tensors().values()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_tensors_restore_the_block(case):
    block, expected = case
    restored = type(block).restore(block.tensors(), block.shape)
    assert restored.shape == block.shape
    assert torch.equal(restored.dense(), block.dense())


def test_memory_is_what_is_allocated(case):
    block, _ = case
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in block.tensors().values()
    }
    assert block.memory_bytes() == sum(storages.values())


def test_every_concrete_block_is_in_the_suite():
    classes = {type(make()[0]).__name__ for make in CASES.values()}
    assert classes == set(BLOCKS)


# ------------------------------------------------------------------- constructors and inverses


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiagonalBlock(torch.ones(3)), "rows, columns"),
        (lambda: DenseBlock(torch.ones(2, 3, 4), (2, 3)), r"\(n, b, b\)"),
        (lambda: DenseBlock(torch.ones(2, 3, 3), (3, 3)), "expected 3 chunks of 3"),
        (
            lambda: EigenBlock(torch.ones(1, 2, 2), torch.ones(1, 3, 3), torch.ones(1, 2, 4)),
            r"right \(1, 4, 4\)",
        ),
        (lambda: SharedBlock(torch.ones(2, 3, 3), (3, 3)), "h a divisor of 3"),
        (
            lambda: LowRankBlock(torch.ones(2, 3), torch.tensor(1.0)),
            r"root: expected \(m, rows, columns\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ShapeMismatch, match=message):
        make()


def test_damped_inverse():
    matrices = torch.stack([spd(4), torch.zeros(4, 4, dtype=torch.float64)])
    inverse = invert_damped(matrices, 1e-3)
    eye = torch.eye(4, dtype=torch.float64)
    close(inverse @ (matrices + 1e-3 * eye), eye.expand(2, 4, 4))
    assert torch.equal(inverse, inverse.mT)


def test_an_indefinite_matrix_is_an_error():
    with pytest.raises(NotPositiveDefinite, match="1 of 2"):
        invert_damped(torch.stack([torch.eye(2), -torch.eye(2)]), 1e-3)


def test_inverse_of_damped_kronecker_factors():
    left, right = torch.stack([spd(3), spd(3)]), torch.stack([spd(4), spd(4)])
    right[1, 0] = right[1, :, 0] = 0  # an input that is never on
    block = invert_factors(left, right, 1e-3)
    fisher = torch.block_diag(*(torch.kron(a, b) for a, b in zip(left, right, strict=True)))
    eye = torch.eye(24, dtype=torch.float64)
    close(block.dense() @ (fisher + 1e-3 * eye), eye)


def test_a_low_rank_inverse_beyond_the_dtype_is_an_error():
    gradients = torch.full((1, 1, 1), 1e6)
    with pytest.raises(NotPositiveDefinite, match="Raise the damping"):
        invert_low_rank(gradients, 1e-3)
