"""Counts of the operations in an autograd graph that use a parameter.

A layer's hook gives the gradient of its weight only if nothing else uses the weight. A trial at
some weights cannot show that: a second use may be multiplied by a gate that is 0 there. The graph
shows it: it contains factors that are multiplied by 0, and no operation that this batch skips.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

_SEVERAL = 2
_CHECKPOINT = "CheckpointFunctionBackward"  # with use_reentrant=True
# An autocast converts a weight once for all that use it; the others are views that cost nothing.
_PASSING = {
    "ToCopyBackward0",
    "TBackward0",
    "TransposeBackward0",
    "PermuteBackward0",
    "AliasBackward0",
    "ViewBackward0",
    "UnsafeViewBackward0",
    "ReshapeAliasBackward0",
}


@dataclass(frozen=True)
class Uses:
    """The operations and parameters that a model's outputs are computed from.

    Attributes:
        nodes: all nodes of the graph.
        counts: id of a leaf tensor -> operations that use it.
        hides: whether a part of the model is one node, which hides the parameters that it uses.
    """

    nodes: frozenset[Node]
    counts: dict[int, int]
    hides: bool = False

    def of(self, parameter: Tensor) -> int:
        """Return the number of operations that use a parameter; 2 where a node hides its uses."""
        return self.counts.get(id(parameter), 0)


def count_uses(outputs: Tensor) -> Uses:
    """Count the uses of all leaf tensors in the graph of `outputs`.

    A conversion or view of a leaf is no use, but its own uses are. A custom function may use its
    inputs in any way, and counts as several.

    Cost: about two microseconds a node, on the host.
    """
    root = outputs.grad_fn
    if root is None:
        return Uses(frozenset(), {id(outputs): 1} if outputs.requires_grad else {})
    users: dict[Node, list[Node]] = {root: []}
    stack, leaves = [root], []
    while stack:
        node = stack.pop()
        children = node.next_functions
        if not children and hasattr(node, "variable"):
            leaves.append(node)
        for child, _ in children:
            if child is None:
                continue
            if child in users:
                users[child].append(node)
            else:
                users[child] = [node]
                stack.append(child)

    def uses(node: Node) -> int:
        count = int(node is root)
        for user in users[node]:
            if user.name() in _PASSING:
                count += uses(user)
            else:
                count += _SEVERAL if isinstance(user, BackwardCFunction) else 1
        return count

    hides = any(type(node).__name__ == _CHECKPOINT for node in users)
    return Uses(frozenset(users), {id(leaf.variable): uses(leaf) for leaf in leaves}, hides)
