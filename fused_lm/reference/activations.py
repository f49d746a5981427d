"""The activations of a feed-forward network and their derivatives, in closed form.

    relu            max(x, 0)
    relu_squared    max(x, 0)^2
    silu            x * s,  s = 1 / (1 + e^-x)                  derivative s * (1 + x * (1 - s))
    gelu            x * Phi(x), Phi the normal distribution     derivative Phi(x) + x * phi(x)
    gelu_tanh       x * (1 + t) / 2,  t = tanh(u),  u = sqrt(2 / pi) * (x + 0.044715 x^3)
                    derivative (1 + t) / 2 + x * (1 - t^2) / 2 * du/dx

A gated one is ``function(gate) * value``: swiglu has silu, geglu gelu, geglu_tanh gelu_tanh.

Sources: Hendrycks, Gimpel 2016 (arXiv:1606.08415); So et al. 2021 (arXiv:2109.08668) for
relu_squared; Shazeer 2020 (arXiv:2002.05202) for the gated ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}
"""Gated activation -> the function of its gate."""

PLAIN = ("gelu", "gelu_tanh", "relu", "relu_squared", "silu")
ACTIVATIONS = (*PLAIN, *GATES)

TANH_CUBIC = 0.044715
TANH_SCALE = math.sqrt(2.0 / math.pi)


def activate(pre: Tensor, activation: str) -> Tensor:
    """[N, F] -> [N, F], or a gated one [N, 2F] -> [N, F]; ``none`` returns ``pre``."""
    if activation in GATES:
        gate, value = pre.chunk(2, dim=-1)
        return activate(gate, GATES[activation]) * value
    match activation:
        case "relu":
            return F.relu(pre)
        case "relu_squared":
            return F.relu(pre).square()
        case "silu":
            return F.silu(pre)
        case "gelu":
            return F.gelu(pre)
        case "gelu_tanh":
            return F.gelu(pre, approximate="tanh")
        case "none":
            return pre
    raise ValueError(f"unknown activation {activation!r}")


def derivative(pre: Tensor, activation: str) -> Tensor:
    """Of a plain activation, at ``pre``; 0 at relu's corner, as torch has it."""
    match activation:
        case "relu":
            return (pre > 0).to(pre.dtype)
        case "relu_squared":
            return 2.0 * F.relu(pre)
        case "silu":
            sigmoid = torch.sigmoid(pre)
            return sigmoid * (1.0 + pre * (1.0 - sigmoid))
        case "gelu":
            normal = torch.exp(-0.5 * pre * pre) / math.sqrt(2.0 * math.pi)
            return 0.5 * (1.0 + torch.erf(pre / math.sqrt(2.0))) + pre * normal
        case "gelu_tanh":
            t = torch.tanh(TANH_SCALE * (pre + TANH_CUBIC * pre**3))
            inner = TANH_SCALE * (1.0 + 3.0 * TANH_CUBIC * pre * pre)
            return 0.5 * (1.0 + t) + 0.5 * pre * (1.0 - t * t) * inner
        case "none":
            return torch.ones_like(pre)
    raise ValueError(f"unknown activation {activation!r}")


def activate_backward(dhidden: Tensor, pre: Tensor, activation: str) -> Tensor:
    """Gradient of ``pre`` from that of ``activate(pre)``."""
    if activation not in GATES:
        return dhidden * derivative(pre, activation)
    gate, value = pre.chunk(2, dim=-1)
    function = GATES[activation]
    dgate = dhidden * value * derivative(gate, function)
    return torch.cat((dgate, dhidden * activate(gate, function)), dim=-1)
