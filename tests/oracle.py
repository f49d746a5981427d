"""Tests' face of ``fused_lm.parity``: raises at the first comparison that is out of tolerance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fused_lm.parity.formulas import attention, layer_norm
from fused_lm.parity.judge import judge
from fused_lm.tolerance import check_close

__all__ = ["attention", "check_against_oracle", "check_strided", "layer_norm"]


def check_against_oracle(
    ours: Callable[..., Sequence[Tensor]],
    formula: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    names: Sequence[str],
) -> None:
    """Holds outputs and every gradient against the formula; ``names`` are outputs, then
    ``d<input>``.
    """
    outputs = len(names) - len(inputs)
    input_names = [name.removeprefix("d") for name in names[outputs:]]
    for comparison in judge(ours, formula, inputs, names[:outputs], input_names):
        assert comparison.ok, comparison.problem


def check_strided(
    strided: Tensor, dense: Tensor, exact: Tensor, backend: str, name: str = "result"
) -> None:
    """Holds a result of strided inputs against that of their copies: the same bits.

    But for Triton on a GPU: it compiles a kernel for the strides' divisors, and how many elements a
    thread loads decides in which order a row is summed, and which product of ``a * b + c * d`` is
    rounded before the FMA. There ``dense`` is the yardstick.
    """
    if backend == "triton" and strided.is_cuda:
        check_close(strided, dense, exact, name)
    else:
        assert torch.equal(strided, dense), name
