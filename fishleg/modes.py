"""Modes that a model is computed in: evaluation, and the transforms of torch.func."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode with autograd on; restore every module's flag afterwards.

    Recurrent layers run without cuDNN, which has no gradient in evaluation mode, nor a second one.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.enable_grad(), _without_cudnn(model):
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _without_cudnn(model: nn.Module) -> Iterator[None]:
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    if not recurrent or not torch.cuda.is_available():
        yield
        return
    with torch.backends.cudnn.flags(enabled=False):
        yield


@contextmanager
def transformable() -> Iterator[None]:
    """Keep attention from fused kernels, which have no vmap rule and no forward-mode derivative.

    Where torch loops because an operator has no vmap rule, the result is right, if slower. Torch's
    warning is hidden: a source's report names the path of each parameter.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
