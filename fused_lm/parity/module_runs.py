"""One run of a module on given inputs: every output and gradient, by name."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

SEED = 20240607

Results = dict[str, Tensor]


class Way(NamedTuple):
    """How a module runs; ``nudge`` changes all that goes in by so much, relatively."""

    dtype: torch.dtype
    nudge: float = 0.0
    seed: int = SEED


class Inputs(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().split("\n")[0]


def mapped(inputs: Inputs, change: Callable[[str, Tensor], Tensor]) -> Inputs:
    """Each tensor changed once, also one that stands in several places: attention looks at that."""
    done: dict[int, Tensor] = {}

    def visit(name: str, value: Any) -> Any:
        def one(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) not in done:
                done[id(leaf)] = change(name if leaf is value else f"{name}.{len(done)}", leaf)
            return done[id(leaf)]

        return pytree.tree_map(one, value)

    args = tuple(visit(f"args[{i}]", value) for i, value in enumerate(inputs.args))
    return Inputs(args, {n: visit(f"kwargs[{n!r}]", value) for n, value in inputs.kwargs.items()})


def named(value: Any, name: str, left_out: list[str] | None = None) -> Results:
    """The tensors and numbers in what a module returned."""
    if isinstance(value, bool | int | float):
        value = torch.tensor(value)
    if isinstance(value, Tensor) and value.layout is torch.strided:
        return {name: torch.view_as_real(value) if value.is_complex() else value}
    if isinstance(value, Mapping):
        parts = {f"{name}[{key!r}]": part for key, part in value.items()}
    elif dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        parts = {f"{name}.{field.name}": getattr(value, field.name) for field in fields}
    else:
        leaves = pytree.tree_leaves(value)
        if any(leaf is value for leaf in leaves):
            if value is not None and left_out is not None:
                left_out.append(f"{name}, of type {type(value).__name__}")
            return {}
        parts = {f"{name}[{i}]": leaf for i, leaf in enumerate(leaves)}
    found = [named(part, key, left_out) for key, part in parts.items()]
    return {key: tensor for part in found for key, tensor in part.items()}


def outputs_of(module: nn.Module, inputs: Inputs, way: Way, left_out: Any = None) -> Results:
    """Without gradients. A copy runs: what a call changes in a module doesn't reach the next."""
    module, fed, _ = _ready(module, inputs, way)
    with torch.no_grad():
        return named(module(*fed.args, **fed.kwargs), "out", left_out)


def results_of(module: nn.Module, inputs: Inputs, way: Way, cotangents: Results) -> Results:
    """Everything to compare, by name. Empty ``cotangents`` are filled: the first run says what is
    finite.
    """
    found: Results = {}
    if not module.training:
        plain = outputs_of(module, inputs, way)
        found.update({f"no_grad {name}": value for name, value in plain.items()})
    module, fed, leaves = _ready(module, inputs, way)
    outputs = named(module(*fed.args, **fed.kwargs), "out")
    found.update({name: value.detach().clone() for name, value in outputs.items()})
    cotangents.update({} if cotangents else cotangents_of(outputs))
    if backward(outputs, {name: _nudged(c, way) for name, c in cotangents.items()}):
        for name, leaf in leaves.items():
            grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            found[f"d {name}"] = grad.to_dense() if grad.is_sparse else grad
    return found


def _ready(module: nn.Module, inputs: Inputs, way: Way) -> tuple[nn.Module, Inputs, Results]:
    """A copy of the module, inputs for one call, and all that gets a gradient, by name."""
    module = copy.deepcopy(module).to(way.dtype)
    leaves: Results = {}

    def feed(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        leaves[name] = _nudged(tensor, way).to(way.dtype).clone().requires_grad_()
        return leaves[name].clone()  # modules may write into their inputs

    torch.manual_seed(SEED)
    fed = mapped(inputs, feed)
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point():
            parameter.data.copy_(_nudged(parameter.data, way))
        if parameter.requires_grad:
            leaves[name] = parameter
    module.zero_grad(set_to_none=True)
    torch.manual_seed(way.seed)
    return module, fed, leaves


def _nudged(tensor: Tensor, way: Way) -> Tensor:
    return tensor * (1.0 + way.nudge * (torch.randint_like(tensor, 2) * 2 - 1))


def cotangents_of(outputs: Results) -> Results:
    """Random; 0 where the output is not finite, which else would fill every gradient with NaN."""
    random = torch.Generator().manual_seed(SEED)
    return {
        name: torch.randn(o.shape, generator=random).to(o).masked_fill(~o.detach().isfinite(), 0.0)
        for name, o in outputs.items()
        if o.is_floating_point()
    }


def backward(outputs: Results, cotangents: Results) -> bool:
    """Whether any output has a gradient. One of another shape is left to the comparison."""
    pairs = [
        (output, cotangents[name].to(output.dtype))
        for name, output in outputs.items()
        if output.requires_grad and name in cotangents and output.shape == cotangents[name].shape
    ]
    if pairs:
        torch.autograd.backward([o for o, _ in pairs], [c for _, c in pairs])
    return bool(pairs)
