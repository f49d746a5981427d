"""What every operator shares: backends behind one opaque op, autograd on it, and the exits to the
reference.

The way of a call below dispatch:

- eager, no gradient: :func:`execute`
- eager, gradient: an old-style ``autograd.Function`` around it (a fifth of the cost of registered
  autograd)
- compile, export, second derivatives: the op with its registered autograd formula
- ``torch.func`` transforms, forward-mode AD, foreign tensor subclasses: the reference, plain
  PyTorch
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _AutoDispatchBelowAutograd,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
)
from torch.autograd import forward_ad, profiler
from torch.compiler import is_compiling

from fused_lm.ops.checks import autocast_enabled
from fused_lm.ops.schemas import LIBRARY

_PACKAGES = {"triton": "triton_kernels"}
"""Backends whose package has another name (``import triton`` inside ``fused_lm/triton`` would read
badly).
"""


_SOURCES: dict[str, tuple[str, str]] = {}
FUNCTIONS: dict[str, dict[str, Callable[..., Any]]] = {}
"""Operator, or what stands beside it, -> backend -> function, filled at first use."""


def backend_module(backend: str, file: str) -> Any:
    """The module ``file`` of a backend, imported at first use (Triton is heavy)."""
    return importlib.import_module(f"fused_lm.{_PACKAGES.get(backend, backend)}.{file}")


def implement(op: str, file: str, function: str) -> None:
    """Routes ``torch.ops.fused_lm.<op>`` to ``function`` of the backend that its last argument
    names.
    """
    stand_beside(op, file, function)

    def run(*args: Any) -> Any:
        *rest, backend = args
        call = function_of(op, backend)
        device = next(a for a in rest if isinstance(a, Tensor)).device
        if autocast_enabled(device):  # an operator's arithmetic is its own
            with torch.autocast(device.type, enabled=False):
                return call(*rest)
        return call(*rest)

    run.__name__ = op
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(op, run, key)


def stand_beside(name: str, file: str, function: str) -> None:
    """Lets :func:`function_of` find what backends have in ``file`` that is no operator."""
    FUNCTIONS[name] = {}
    _SOURCES[name] = (file, function)


def function_of(op: str, backend: str) -> Callable[..., Any]:
    """What a backend has for an operator."""
    found = FUNCTIONS[op].get(backend)
    if found is None:
        file, function = _SOURCES[op]
        found = FUNCTIONS[op][backend] = getattr(backend_module(backend, file), function)
    return found


def register_autograd(
    op: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., tuple[Tensor, ...]],
) -> None:
    """The formula that ``torch.compile`` and ``torch.export`` trace.

    ``setup_context`` saves what ``backward`` needs and returns the leading outputs that have a
    gradient.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = (output,) if isinstance(output, Tensor) else output
        differentiable = setup_context(ctx, inputs, outputs)
        ctx.mark_non_differentiable(*outputs[len(differentiable) :])
        ctx.set_materialize_grads(False)

    torch.library.register_autograd(f"fused_lm::{op}", backward, setup_context=setup, lib=LIBRARY)


def route(
    op: str,
    tensors: int,
    reference: Callable[..., Any],
    setup_context: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., Any],
    adapt: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """``run(arguments, backend, extra)`` of an op whose first ``tensors`` arguments are tensors.

    ``extra`` is no argument of the op: an eager ``setup_context`` finds it as ``ctx.extra``.
    ``backward`` and ``setup_context`` are those of :func:`register_autograd`;
    An op of rows has ``adapt(function, *arguments)``, which calls a way with a first tensor of
    two dims; it is asked only for others.
    """
    opaque = getattr(torch.ops.fused_lm, op).default
    functions = FUNCTIONS[op]

    def direct(*arguments: Any) -> Any:
        """As :func:`execute`, for a caller who has looked at the tensors."""
        function = functions.get(arguments[-1])
        if function is None or _watched():
            return execute(op, *arguments)
        with _AutoDispatchBelowAutograd():
            return function(*arguments[:-1])

    def ways(*functions: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
        return (*functions, _eager_function(op, functions[1], setup_context, backward))

    own_shapes = ways(reference, direct, opaque)
    others = own_shapes
    if adapt is not None:
        others = ways(*(partial(adapt, way) for way in (reference, direct, opaque)))

    def run(arguments: tuple[Any, ...], backend: str, extra: Any = None) -> Any:
        inputs = arguments[:tensors]
        found = own_shapes if inputs[0].dim() == 2 else others
        plain, unrecorded, compiled, recorded = found
        if is_compiling():
            return compiled(*arguments, backend)
        if _are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return plain(*arguments)
        last = 0
        for i, t in enumerate(inputs, 1):
            if t is not None:
                if type(t) not in _PLAIN and _is_foreign(t):
                    return plain(*arguments)
                if t.requires_grad:
                    last = i
        if last == 0 or not torch.is_grad_enabled():
            return unrecorded(*arguments, backend)
        rest = arguments[last:] + (backend,)
        return recorded(*(arguments[:last] + (rest, extra)))

    return run


def _eager_function(
    op: str,
    forward: Callable[..., Any],
    setup_context: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., Any],
) -> Callable[..., tuple[Tensor, ...]]:
    """``apply`` of an ``autograd.Function`` around ``forward``, with as little Python as can be.

    Each argument and each output costs a call a fifth of a microsecond or more: what lies behind
    the last input with a gradient goes in as one tuple, and what only the backward needs is no
    output. ``apply`` is that of Function's base: Function's own asks again what :func:`route` has.
    """

    def forward_of(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        arguments, extra = inputs[:-2] + inputs[-2], inputs[-1]
        outputs = forward(*arguments)
        ctx.set_materialize_grads(False)
        if extra is None:
            return setup_context(ctx, arguments, outputs)
        ctx.extra = extra
        outputs = setup_context(ctx, arguments, outputs)
        ctx.extra = None  # what of it is needed has been saved
        return outputs

    def backward_of(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        inputs = len(ctx.needs_input_grad) - 2
        return (*backward(ctx, *gradients)[:inputs], None, None)

    members = {"forward": staticmethod(forward_of), "backward": staticmethod(backward_of)}
    name = "Fused" + "".join(word.capitalize() for word in op.removesuffix("_fwd").split("_"))
    metaclass: Any = type(torch.autograd.Function)
    function = metaclass(name, (torch.autograd.Function,), members)
    return super(torch.autograd.Function, function).apply


def register_fake(op: str, fake: Callable[..., Any]) -> None:
    """Shapes, dtypes and devices of the outputs, without data."""
    torch.library.register_fake(f"fused_lm::{op}", fake, lib=LIBRARY)


def register_fake_of_cuda(op: str, fake: Callable[..., Any]) -> None:
    """As :func:`register_fake` for the extension's op behind ``op``, which has no backend."""
    register_fake(f"cuda_{op}", lambda *arguments: fake(*arguments, "cuda"))


def in_transform() -> bool:
    """True inside ``torch.func`` transforms and forward-mode AD, which no opaque op can follow."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def through_reference(tensors: Sequence[Tensor | None]) -> bool:
    """True where an opaque operator can't follow: transforms, foreign subclasses."""
    if is_compiling():
        return False
    return in_transform() or any(
        t is not None and type(t) not in _PLAIN and _is_foreign(t) for t in tensors
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def _is_foreign(t: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return not isinstance(t, FakeTensor | torch.nn.Parameter | torch.nn.Buffer)


def needs_gradient(tensors: Sequence[Tensor | None]) -> bool:
    """True if autograd must record a call on these tensors."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def _watched() -> bool:
    """Whether a dispatch mode or the profiler has to see an op, or autocast to be switched off."""
    return (
        _len_torch_dispatch_stack() > 0
        or profiler._is_profiler_enabled
        or _is_any_autocast_enabled()
    )


def execute(op: str, *args: Any) -> Any:
    """Runs an op that records no gradient; its last argument is the backend.

    A Python kernel behind torch's dispatcher costs 10 to 20 us a call on a CPU. Where nobody looks
    on (no dispatch mode, no profiler, no fake tensors, no autocast to switch off) it is called
    directly.
    """
    if type(args[0]) in _PLAIN and not is_compiling() and not _watched():
        with _AutoDispatchBelowAutograd():
            return function_of(op, args[-1])(*args[:-1])
    opaque = getattr(torch.ops.fused_lm, op).default
    if is_compiling():
        return opaque(*args)
    with _AutoDispatchBelowAutograd():
        return opaque(*args)


def run_backward(op: str, *arguments: Any, differentiable: bool = True) -> Any:
    """Runs the op of a backward; with ``create_graph`` so that it can be differentiated again.

    Raises:
        RuntimeError: ``create_graph``, and the op is not differentiable.
    """
    if not torch.is_grad_enabled():
        return execute(op, *arguments)
    if not differentiable:
        raise RuntimeError(f"{op} adds into a given gradient, which has no second derivative")
    return getattr(torch.ops.fused_lm, op).default(*arguments)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype autocast would cast to on this device, None outside of autocast."""
    if not autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device.type)


def make_rng(device: torch.device | str, head_offset: int = 0, row_offset: int = 0) -> Tensor:
    """A dropout state drawn from torch's generator of ``device``: int64 [4].

    The four numbers are (seed, offset, head offset, row offset): ranks that hold a slice of the
    heads or of the rows pass where their slice starts and draw from equal generators, and the mask
    is that of one device. Safe under CUDA graphs, ``torch.compile`` and activation checkpointing.
    """
    random = torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device)
    # Padding fills on the device; a tensor made of Python numbers would be a copy from the host,
    # which a CUDA graph can't capture.
    with_head = torch.nn.functional.pad(random, (0, 1), value=head_offset)
    return torch.nn.functional.pad(with_head, (0, 1), value=row_offset)
