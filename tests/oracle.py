"""Tests' face of ``fused_lm.parity``: raises at the first comparison that is out of tolerance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fused_lm.parity.formulas import attention, layer_norm
from fused_lm.parity.judge import judge

__all__ = ["attention", "check_against_oracle", "layer_norm"]


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
