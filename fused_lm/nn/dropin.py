"""What the classes share that stand in for torch's and others' modules.

A drop-in is a subclass that adds no state: same ``__name__``, same parameters, same attributes. So
``module.__class__`` can be changed in place, either way, and hooks, optimisers, tied weights and
``state_dict`` don't notice (:func:`fused_lm.fuse`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fused_lm import dispatch
from fused_lm.explain import call_of

TYPICAL_TOKENS = 1024
"""Length of the call for which a report names the backend."""


class DropIn:
    """Mixin of a class that can be put onto a stock module in place.

    Attributes:
        stock: The class that it stands for.
        kind: Which switch of :func:`fused_lm.fuse` it belongs to: attention, norm or ffn.
    """

    stock: ClassVar[type[nn.Module]]
    kind: ClassVar[str]

    def likely_backend(self, tokens: int = TYPICAL_TOKENS) -> str:
        """The backend that a call of so many tokens would run on now, on the device and in the
        dtype of the parameters.
        """
        raise NotImplementedError

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in this module's place: the stock class around the
        same parameters. TorchScript can't read the fused forward.
        """
        twin = self.stock.__new__(self.stock)
        twin.__dict__.update(self.__dict__)
        children = self.__dict__["_modules"]
        twin.__dict__["_modules"] = {name: _scriptable(child) for name, child in children.items()}
        return twin


def _scriptable(module: nn.Module | None) -> nn.Module | None:
    """A child as TorchScript takes it; containers are copied, because torch would replace their
    children in place.
    """
    if isinstance(module, DropIn):
        return module.__prepare_scriptable__()
    if module is None or not any(isinstance(child, DropIn) for child in module.modules()):
        return module
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__.update(module.__dict__)
    children = module.__dict__["_modules"]
    twin.__dict__["_modules"] = {name: _scriptable(child) for name, child in children.items()}
    return twin


def stays_stock(x: Tensor) -> bool:
    """Whether no kernel can run on ``x`` now, so that the stock class's own forward should: its
    results are then its own to the last bit.
    """
    forced = dispatch.current_backend()
    if forced == "pytorch" or (forced == "auto" and x.device.type == "cpu"):
        return True
    return torch.jit.is_tracing()  # a TorchScript graph holds torch's operators


def offered(op: str) -> bool:
    """Whether the forced backend has the operator at all. Where it has not, as ``cuda`` has no
    feed-forward network, a drop-in's part stays stock.
    """
    forced = dispatch.current_backend()
    return forced == "auto" or any(impl.name == forced for impl in dispatch.TABLE[op])


def backend_of(op: str, *args: Any, **kwargs: Any) -> str:
    """The backend that dispatch takes for ``fused_lm.<op>(*args, **kwargs)``."""
    return dispatch.choose(op, call_of(op, *args, **kwargs))


def kernel_runs(op: str, *args: Any, **kwargs: Any) -> bool:
    """Whether dispatch takes a kernel of ours for ``fused_lm.<op>(*args, **kwargs)``."""
    return backend_of(op, *args, **kwargs) not in ("pytorch", "reference")


def stand_in(shape: Iterable[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of one element's memory that looks to dispatch like a full one, on the device and,
    unless given, in the dtype of ``like``.
    """
    return torch.empty((), dtype=dtype or like.dtype, device=like.device).expand(*shape)


def is_untouched(module: nn.Module, *types: type[nn.Module]) -> bool:
    """Whether a fused operator may do a module's work without calling it: its class is exactly one
    of ``types``, nobody replaced its ``forward``, and nobody listens to its calls.
    """
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
        torch_module._global_forward_hooks,
        torch_module._global_forward_pre_hooks,
        torch_module._global_backward_hooks,
        torch_module._global_backward_pre_hooks,
    )
    return type(module) in types and "forward" not in module.__dict__ and not any(hooks)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a fused operator may read the module's weight in its place: nobody replaced it, its
    ``forward`` or its weight (by an adapter, a quantised one), and nobody listens to its calls.
    """
    return is_untouched(module, nn.Linear) and type(module.weight) in (Tensor, nn.Parameter)


def is_drop_in(module: nn.Module) -> bool:
    """Whether a module's class is exactly a drop-in's, and not one that someone made of it."""
    return "stock" in type(module).__dict__ and isinstance(module, DropIn)
