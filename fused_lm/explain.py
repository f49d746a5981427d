"""``fused_lm.why``: which backend a call would run on, and the reason of every other."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from fused_lm import dispatch
from fused_lm.ops.attention import attention, attention_weights
from fused_lm.ops.attention_checks import checked_call, checked_weights_call
from fused_lm.ops.attention_decode import attention_decode
from fused_lm.ops.attention_decode_checks import checked_call as checked_decode_call
from fused_lm.ops.attention_varlen import attention_varlen
from fused_lm.ops.attention_varlen_checks import checked_call as checked_varlen_call
from fused_lm.ops.cross_entropy import cross_entropy
from fused_lm.ops.cross_entropy_checks import checked_call as checked_cross_entropy
from fused_lm.ops.cross_entropy_checks import checked_linear_call
from fused_lm.ops.ffn import ffn
from fused_lm.ops.layernorm import layer_norm, rms_norm
from fused_lm.ops.layernorm_checks import checked_call as checked_norm_call
from fused_lm.ops.linear_act import linear_act
from fused_lm.ops.linear_checks import checked_ffn, checked_linear_act
from fused_lm.ops.linear_cross_entropy import linear_cross_entropy
from fused_lm.ops.linear_residual import linear_residual
from fused_lm.ops.linear_residual_checks import checked_linear_residual
from fused_lm.ops.rotary import rotary
from fused_lm.ops.rotary_checks import checked_call as checked_rotary_call


class _Operator(NamedTuple):
    public: Callable[..., Any]
    checked: Callable[..., Any]


_OPERATORS = {
    "attention": _Operator(attention, checked_call),
    "attention_weights": _Operator(attention_weights, checked_weights_call),
    "attention_decode": _Operator(attention_decode, checked_decode_call),
    "attention_varlen": _Operator(attention_varlen, checked_varlen_call),
    "layer_norm": _Operator(layer_norm, checked_norm_call),
    "rms_norm": _Operator(rms_norm, checked_norm_call),
    "cross_entropy": _Operator(cross_entropy, checked_cross_entropy),
    "linear_cross_entropy": _Operator(linear_cross_entropy, checked_linear_call),
    "linear_act": _Operator(linear_act, checked_linear_act),
    "linear_residual": _Operator(linear_residual, checked_linear_residual),
    "ffn": _Operator(ffn, checked_ffn),
    "rotary": _Operator(rotary, checked_rotary_call),
}


def why(op: str, *args: Any, **kwargs: Any) -> dispatch.Explanation:
    """Every backend's verdict on ``fused_lm.<op>(*args, **kwargs)``, without running it.

    Args:
        op: Name of an operator of :data:`fused_lm.dispatch.TABLE`, like ``"attention"``.
        args, kwargs: As given to the operator; they are checked as it checks them.
    Returns:
        An :class:`~fused_lm.dispatch.Explanation`; ``print`` it.
    Raises:
        ValueError: Unknown operator, or what the operator itself raises.
    """
    return dispatch.explain(op, call_of(op, *args, **kwargs))


def call_of(op: str, *args: Any, **kwargs: Any) -> Any:
    """The checked arguments of ``fused_lm.<op>(*args, **kwargs)``, as dispatch and records see
    them.
    """
    if op not in _OPERATORS:
        names = ", ".join(_OPERATORS)
        raise ValueError(f"fused_lm has no operator {op!r}; expected one of: {names}")
    bound = _signature(_OPERATORS[op].public).bind(*args, **kwargs)
    bound.apply_defaults()
    taken = _signature(_OPERATORS[op].checked).parameters
    arguments = {name: bound.arguments.get(name) for name in taken}
    if op == "rms_norm" and arguments["eps"] is None:
        arguments["eps"] = 0.0
    return _OPERATORS[op].checked(**arguments)


_signature = functools.cache(inspect.signature)
"""Reading one takes longer than dispatch itself."""
