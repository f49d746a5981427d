"""``fuse()`` on the inputs that torch itself ships for these modules."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_modules import module_db

import fused_lm
from tests import taken
from tests.gpu import HAS_GPU, TRITON_LATER
from tests.modules import ROUNDINGS, Change, check_against_stock
from tests.simt import backend as simt

NAMES = (
    "LayerNorm", "RMSNorm", "MultiheadAttention", "TransformerEncoderLayer",
    "TransformerDecoderLayer", "TransformerEncoder", "Transformer",
)  # fmt: skip
EMBED_DIM, HEADS = 64, 2
"""Of the rebuilt list: head dim 32, which every kernel takes."""
FORCED = (*(() if HAS_GPU else TRITON_LATER), *simt.ONE)
SUITE = "torch's own inputs"
WITH_RELU = 24
SAMPLE = 32
"""``make test`` takes every so many of the transformers' cases on the kernels, and every fourth of
them on auto.
"""
LARGE_SAMPLE = 1 if HAS_GPU else 3
"""``make test-all`` takes all of them on auto and on a GPU. In the interpreter and on the harness
it takes a third: of flags, which come in powers of two, each in all of its values and by pairs.
"""


class Entry(NamedTuple):
    """One module and one call of it."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    training: bool


def _entries(name: str, training: bool, dtype: torch.dtype, rebuilt: bool) -> Iterator[Entry]:
    (info,) = [info for info in module_db if info.module_cls is getattr(nn, name)]
    samples = info.module_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=training
    )
    for index, sample in enumerate(samples):
        made, call = sample.constructor_input, sample.forward_input
        args, kwargs, inputs = list(made.args), dict(made.kwargs), dict(call.kwargs)
        tensors = [t.to(dtype) for t in call.args]
        if name == "TransformerEncoder":  # the list holds layers that are made already
            args = [_larger_layer(args[0]) if rebuilt else args[0], args[1]]
        elif rebuilt:
            _enlarge(name, args, kwargs, inputs)
        torch.manual_seed(index)
        if rebuilt:
            tensors = [torch.randn(*t.shape[:-1], EMBED_DIM).to(dtype) for t in tensors]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # encoders say why they don't use NestedTensors
            module = getattr(nn, name)(*args, **kwargs).to(dtype).train(training)
        yield Entry(f"{name} {index}", module, tuple(tensors), inputs, training)


def _enlarge(name: str, args: list[Any], kwargs: dict[str, Any], inputs: dict[str, Any]) -> None:
    """Constructor and masks of the rebuilt list, in place."""
    if name in ("LayerNorm", "RMSNorm"):
        args[0] = [*args[0][:-1], EMBED_DIM]
    elif name == "MultiheadAttention":
        kwargs.update(embed_dim=EMBED_DIM, num_heads=HEADS)
        if inputs["attn_mask"] is not None:  # one mask per head
            inputs["attn_mask"] = inputs["attn_mask"][:HEADS]
    elif args:
        args[:3] = [EMBED_DIM, HEADS, 2 * EMBED_DIM]
    else:
        kwargs.update(d_model=EMBED_DIM, nhead=HEADS, dim_feedforward=2 * EMBED_DIM)


def _larger_layer(layer: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(
        EMBED_DIM,
        HEADS,
        2 * EMBED_DIM,
        layer.dropout.p,
        layer.activation,
        batch_first=layer.self_attn.batch_first,
        norm_first=layer.norm_first,
        bias=layer.linear1.bias is not None,
    )


def _run(module: nn.Module, entry: Entry, change: Change, grad: bool = True) -> list[Tensor]:
    """Outputs, then the gradients of inputs and parameters."""
    torch.manual_seed(0)
    leaves = [change(t.detach().clone()).requires_grad_(grad) for t in entry.args]
    with torch.set_grad_enabled(grad):
        result = module(*leaves, **entry.kwargs)
    outputs = [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]
    if not grad:
        return outputs
    points = [*leaves, *module.parameters()]
    slopes = [torch.linspace(-1, 1, t.numel() or 1)[: t.numel()].view(t.shape) for t in outputs]
    total = sum((t.double() * slope).sum() for t, slope in zip(outputs, slopes, strict=True))
    return [t.detach() for t in (*outputs, *torch.autograd.grad(total, points))]


def _same(t: Tensor) -> Tensor:
    return t


def _check_bits(name: str, training: bool, step: int) -> None:
    """With gradients and, in eval, without: then stock takes its native fast paths."""
    count = 0
    for index, entry in enumerate(_entries(name, training, torch.float32, rebuilt=False)):
        if index % step:
            continue
        ours = copy.deepcopy(entry.module)
        assert fused_lm.fuse(ours).changed > 0
        for grad in (True,) if training else (True, False):
            wanted = _run(entry.module, entry, _same, grad)
            got = _run(ours, entry, _same, grad)
            assert len(wanted) == len(got)
            for a, b in zip(wanted, got, strict=True):
                assert torch.equal(a, b), entry.name
            count += 1
    assert count >= 6


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_auto_gives_torchs_bits(name: str, training: bool) -> None:
    _check_bits(name, training, 1 if "Norm" in name else 4)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_auto_gives_torchs_bits_in_every_case(name: str, training: bool) -> None:
    _check_bits(name, training, 1)


def _compare_all(
    name: str, backend: str, dtype: torch.dtype, training: bool, step: int, suite: str
) -> None:
    mine = []
    for index, entry in enumerate(_entries(name, training, dtype, rebuilt=True)):
        if index % step:
            continue
        ours = copy.deepcopy(entry.module)
        fused_lm.fuse(ours)
        running = simt.installed(backend, index) if backend in simt.BACKENDS else nullcontext()
        case = f"{entry.name} {dtype} {training}"
        with running, fused_lm.use_backend(backend):
            with taken.watched(suite, backend, case) as choices:
                got = _run(ours, entry, _same)
        mine.append(any(chosen == backend for _, chosen in choices))

        def stock(module: nn.Module, change: Change, entry: Entry = entry) -> list[Tensor]:
            return _run(module, entry, change)

        roundings = WITH_RELU if "Transformer" in name else ROUNDINGS
        check_against_stock(entry.module, got, stock, torch.finfo(dtype).eps, roundings)
    print(f"{name} {dtype}: {backend} took {sum(mine)} of {len(mine)}")
    assert sum(mine) >= 0.9 * len(mine)


@pytest.mark.parametrize("forced", FORCED)
@pytest.mark.parametrize("name", NAMES)
def test_some_on_the_kernels(name: str, forced: str) -> None:
    step = 1 if "Norm" in name else SAMPLE
    _compare_all(name, forced, torch.bfloat16, True, step, f"{SUITE}, a sample")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "dtype"), [(True, torch.bfloat16), (False, torch.float16)], ids=["train", "eval"]
)
@pytest.mark.parametrize("forced", FORCED)
@pytest.mark.parametrize("name", NAMES)
def test_all_on_the_kernels(name: str, forced: str, training: bool, dtype: torch.dtype) -> None:
    step = LARGE_SAMPLE if "Transformer" in name else 1
    _compare_all(name, forced, dtype, training, step, SUITE)
