"""Tensors of which each process holds a share (``DTensor``), without importing them elsewhere.

The import of ``torch.distributed.tensor`` takes a second, which only "fsdp" should pay.
"""

from __future__ import annotations

from torch import Tensor


def is_shared(tensor: Tensor) -> bool:
    """Whether each process holds a share of it."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process; every process calls it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def share_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, shared out as ``parameter`` is; as it is where their shapes differ."""
    if not is_shared(parameter) or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    on_device = tensor.to(parameter.device)
    return distribute_tensor(on_device, parameter.device_mesh, parameter.placements)
