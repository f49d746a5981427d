"""Derivatives of an op through plain PyTorch: of a backward op they are second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_lm.ops.registration import register_autograd


def register_reference_gradient(op: str, function: Callable[..., Any]) -> None:
    """The derivatives of ``op`` are those of ``function``, which takes its arguments without the
    backend.
    """

    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        ctx.tensor_at = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.rest = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*(inputs[i] for i in ctx.tensor_at))
        return output

    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        arguments = list(ctx.rest)
        for i, tensor in zip(ctx.tensor_at, ctx.saved_tensors, strict=True):
            arguments[i] = tensor
        wanted = [i for i in ctx.tensor_at if ctx.needs_input_grad[i]]
        result = _vjp(function, arguments[:-1], wanted, gradients)
        return tuple(result.get(i) for i in range(len(arguments)))

    register_autograd(op, backward, setup_context)


def _vjp(
    function: Callable[..., Any],
    arguments: list[Any],
    wanted: Sequence[int],
    gradients: Sequence[Tensor | None],
) -> dict[int, Tensor | None]:
    """Vector-Jacobian product of ``function`` for the arguments at ``wanted``, by plain
    autograd.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        for i in wanted:
            tensor = arguments[i]
            arguments[i] = tensor if create_graph else tensor.detach().requires_grad_()
        outputs = function(*arguments)
        if isinstance(outputs, Tensor):
            outputs = (outputs,)
        pairs = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        if not pairs:
            return {}
        found = torch.autograd.grad(
            [output for output, _ in pairs],
            [arguments[i] for i in wanted],
            [gradient for _, gradient in pairs],
            allow_unused=True,
            create_graph=create_graph,
        )
    return dict(zip(wanted, found, strict=True))
