"""Slow, dense, obvious float64 versions of what the library does fast.

Shares no code with the library, and loops where it can: every function here is to be checked by
reading. A group is given as (weight name, bias name or None); its matrix is the weight flattened
to (out, in k k), with the bias as last column, and its vector that matrix row by row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Group = tuple[str, str | None]

# ------------------------------------------------------------------- gradients and the Fisher


def group_vector(tensors: dict[str, Tensor], group: Group) -> Tensor:
    """Return the row-major vector of a group's matrix, from tensors of the parameters' shapes."""
    weight, bias = group
    matrix = tensors[weight].reshape(-1, 1) if tensors[weight].ndim == 0 else tensors[weight]
    rows = [row.flatten() for row in matrix]
    if bias is not None:
        rows = [
            torch.cat([row, entry[None]]) for row, entry in zip(rows, tensors[bias], strict=True)
        ]
    return torch.cat(rows)


def flat_vector(tensors: dict[str, Tensor], groups: Sequence[Group]) -> Tensor:
    """Return the vectors of all groups one after the other."""
    return torch.cat([group_vector(tensors, group) for group in groups])


def gradient(model: nn.Module, value: Tensor, groups: Sequence[Group]) -> Tensor:
    """Return d value / d parameters as one vector over the groups, none of which is frozen."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(
        value, list(parameters.values()), retain_graph=True, materialize_grads=True
    )
    dense = [one.to_dense() if one.is_sparse else one for one in found]
    return flat_vector(dict(zip(parameters, dense, strict=True)), groups)


def sample_gradients(
    model: nn.Module,
    nll: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    groups: Sequence[Group],
) -> Tensor:
    """Return the gradient of each sample's loss, (N, parameters), one sample at a time."""
    model = copy.deepcopy(model).eval()
    rows = [
        gradient(model, nll(model(x[None]), y[None])[0], groups)
        for x, y in zip(inputs, targets, strict=True)
    ]
    return torch.stack(rows)


def softmax_hessian(outputs: Tensor) -> Tensor:
    """Return diag(p) - p p^T for one sample's logits (C,)."""
    p = outputs.softmax(0)
    return torch.diag(p) - torch.outer(p, p)


def positions_hessian(outputs: Tensor, counts: Sequence[bool]) -> Tensor:
    """Return the blocks of one sample's logits (T, C), 0 for positions that do not count."""
    blocks = [softmax_hessian(f) * float(count) for f, count in zip(outputs, counts, strict=True)]
    return torch.block_diag(*blocks)


def gaussian_hessian(outputs: Tensor, variance: float = 1.0) -> Tensor:
    """Return I / variance for one sample's outputs (d,)."""
    return torch.eye(len(outputs), dtype=outputs.dtype) / variance


def bernoulli_hessian(outputs: Tensor) -> Tensor:
    """Return diag(p (1 - p)) for one sample's logits (d,)."""
    p = 1 / (1 + torch.exp(-outputs))
    return torch.diag(p * (1 - p))


def dense_fisher(
    model: nn.Module,
    inputs: Tensor,
    groups: Sequence[Group],
    hessian: Callable[[Tensor], Tensor] = softmax_hessian,
) -> Tensor:
    """Return F = (1/N) sum_n J_n^T H_n J_n over all groups' parameters, as one dense matrix."""
    model = copy.deepcopy(model).eval()
    total = 0.0
    for x in inputs:
        outputs = model(x[None]).flatten()
        jacobian = torch.stack([gradient(model, output, groups) for output in outputs])
        total = total + jacobian.T @ hessian(outputs.detach()) @ jacobian
    return total / len(inputs)


def damped_inverse(fisher: Tensor, damping: float) -> Tensor:
    """Return (F + damping I)^-1."""
    return torch.linalg.inv(fisher + damping * torch.eye(len(fisher), dtype=fisher.dtype))


# ------------------------------------------------------------------ blocks and the objective


def kronecker_matrix(b: Tensor, c: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return the matrix of V -> A o [ B (A o V) C ], column by column from unit matrices."""
    a = torch.ones(len(b), len(c), dtype=b.dtype) if scale is None else scale
    images = []
    for i in range(len(b)):
        for j in range(len(c)):
            unit = torch.zeros_like(a)
            unit[i, j] = 1.0
            images.append((a * (b @ (a * unit) @ c)).flatten())
    return torch.stack(images, dim=1)


def tensor_matrix(
    out: Tensor,
    inner: Tensor,
    kernel: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Return the matrix of the tensor block: a Kronecker block with a structured column factor."""
    columns = torch.kron(inner, kernel)
    if bias is not None:
        columns = torch.block_diag(columns, bias.reshape(1, 1))
    return kronecker_matrix(out, columns, scale)


def eigen_matrix(left: Tensor, right: Tensor, values: Tensor) -> Tensor:
    """Return blockdiag_k( (U_k (x) W_k) diag(vec S_k) (U_k (x) W_k)^T )."""
    bases = [torch.kron(u, w) for u, w in zip(left, right, strict=True)]
    inner = [s.flatten().diag() for s in values]
    return torch.block_diag(*(v @ s @ v.T for v, s in zip(bases, inner, strict=True)))


def block_matrix(kind: str, tensors: dict[str, Tensor], size: int) -> Tensor:
    """Return the dense Q of a block of the library, from its tensors."""
    if kind == "KroneckerBlock":
        return kronecker_matrix(**tensors)
    if kind == "EigenBlock":
        return eigen_matrix(**tensors)
    if kind == "TensorBlock":
        return tensor_matrix(**tensors)
    if kind == "DiagonalBlock":
        return tensors["values"].flatten().diag()
    return torch.block_diag(*tensors["matrices"])[:size, :size]


def objective(q: Tensor, fisher: Tensor, damping: float, mask: Tensor | None = None) -> Tensor:
    """Return J = 1/2 tr(Q F_g Q) - tr Q, with M o Q o M in place of Q."""
    if mask is not None:
        keep = mask.flatten().to(q.dtype).diag()
        q = keep @ q @ keep
    damped = fisher + damping * torch.eye(len(q), dtype=q.dtype)
    return 0.5 * torch.trace(q @ damped @ q) - torch.trace(q)


def least_objective(fisher: Tensor, damping: float, mask: Tensor | None = None) -> Tensor:
    """Return the least J of any Q: -1/2 tr F_g^-1, on the survivors."""
    keep = torch.ones(len(fisher), dtype=torch.bool) if mask is None else mask.flatten()
    return -0.5 * torch.trace(damped_inverse(fisher[keep][:, keep], damping))


def gradient_fisher(gradients: Tensor) -> Tensor:
    """Return F = sum_n g_n g_n^T of scaled gradients (n, rows, columns)."""
    return sum(torch.outer(g.flatten(), g.flatten()) for g in gradients)


# ------------------------------------------------------------------------------------ pruning


def random_spd(n: int, seed: int) -> Tensor:
    """Return a well-conditioned symmetric positive definite (n, n) matrix, float64."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, dtype=torch.float64, generator=generator)
    return root @ root.mT / n + 0.1 * torch.eye(n, dtype=torch.float64)


def constrained_minimiser(hessian: Tensor, weights: Tensor, removed: Tensor) -> Tensor:
    """Return d of least 1/2 d^T H d with d_i = -w_i on `removed`, by its KKT system."""
    n, k = len(weights), int(removed.sum())
    selector = torch.eye(n, dtype=hessian.dtype)[removed]
    system = torch.cat(
        [
            torch.cat([hessian, selector.mT], dim=1),
            torch.cat([selector, torch.zeros(k, k, dtype=hessian.dtype)], dim=1),
        ]
    )
    rhs = torch.cat([torch.zeros(n, dtype=hessian.dtype), -weights[removed]])
    return torch.linalg.solve(system, rhs)[:n]


# --------------------------------------------------------------------- blocks of the inverse


def chunked_inverse(fisher: Tensor, damping: float, size: int) -> Tensor:
    """Return the block diagonal of inverses of chunks of F + damping I, each `size` long."""
    starts = range(0, len(fisher), size)
    chunks = [fisher[s : s + size, s : s + size] for s in starts]
    return torch.block_diag(*(damped_inverse(chunk, damping) for chunk in chunks))


def conv_patches(x: Tensor, conv: nn.Conv2d, group: int) -> Tensor:
    """Return the patch under the kernel for each output position, (T, in/groups k k), of (C, H, W).

    For one group of channels; strides and zero padding, no dilation.
    """
    pad, stride, (high, wide) = conv.padding[0], conv.stride[0], conv.kernel_size
    channels = conv.in_channels // conv.groups
    x = x[group * channels : (group + 1) * channels]
    x = torch.nn.functional.pad(x, (pad, pad, pad, pad))
    patches = []
    for top in range(0, x.shape[1] - high + 1, stride):
        for left in range(0, x.shape[2] - wide + 1, stride):
            patches.append(x[:, top : top + high, left : left + wide].flatten())
    return torch.stack(patches)


def kfac_fisher(model: nn.Module, layer: str, inputs: Tensor) -> Tensor:
    """Return K-FAC's Fisher of a linear or conv layer with bias, softmax outputs, all labels.

    F = Gamma (x) A for each convolution group, one after the other on the diagonal, with
    A = (1/N) sum_n sum_t a a^T and Gamma = (1/N) sum_n sum_y p_y (1/T) sum_t g g^T.
    """
    model = copy.deepcopy(model).eval()
    module = model.get_submodule(layer)
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        seen["input"], seen["output"] = args[0][0].detach(), output
        return output.clone()  # an in-place activation must not change what is kept

    module.register_forward_hook(keep)
    conv_groups = module.groups if isinstance(module, nn.Conv2d) else 1
    rows = module.weight.shape[0] // conv_groups
    fishers = []
    for k in range(conv_groups):
        gamma = a = 0.0
        for x in inputs:
            outputs = model(x[None])[0]
            if isinstance(module, nn.Conv2d):
                patches = conv_patches(seen["input"], module, k)
            else:
                patches = seen["input"].reshape(-1, module.in_features)
            for patch in patches:
                patch = torch.cat([patch, torch.ones(1, dtype=patch.dtype)])
                a = a + torch.outer(patch, patch) / len(inputs)
            for label, p in enumerate(outputs.softmax(0).detach()):
                loss = torch.logsumexp(outputs, 0) - outputs[label]
                (g,) = torch.autograd.grad(loss, seen["output"], retain_graph=True)
                g = g[0].flatten(1) if isinstance(module, nn.Conv2d) else g[0].reshape(-1, rows).T
                for position in g[k * rows : (k + 1) * rows].T:
                    part = torch.outer(position, position) / g.shape[1]
                    gamma = gamma + p * part / len(inputs)
        fishers.append(torch.kron(gamma, a))
    return torch.block_diag(*fishers)
