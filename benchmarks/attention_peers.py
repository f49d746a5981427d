"""Attention of other packages, a few lines each. What one of them lacks it is told to say; that it
isn't installed, Python does.

Theirs is [B, T, H, D]: q, k and v are handed over as views, and cost no copy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .contest import Contestant, Run, check_compiles, check_scores, first

Values = dict[str, Any]


def _lacks(who: str, case: Any, *features: str) -> None:
    """Raises ValueError if the case has one of these features."""
    found = [feature for feature in (*features, "weights") if feature in case.features]
    if case.queries and "decode" in features:
        found.append("fewer queries than keys")
    if found:
        raise ValueError(f"{who} has no {' and no '.join(found)}")


def _rows(values: Values) -> list[Tensor]:
    """q, k and v as [B, T, H, D]."""
    return [values[name].transpose(1, 2) for name in ("q", "k", "v")]


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output as [B, H, T, D] again."""
    return first(result).transpose(1, 2)


def flash_attention_2(case: Any, values: Values) -> Run:
    from flash_attn import flash_attn_func

    _lacks("flash-attn", case, "bias", "key_mask")
    q, k, v = _rows(values)
    return lambda: _first(flash_attn_func(q, k, v, dropout_p=case.dropout_p, causal=case.causal))


def flash_attention_3(case: Any, values: Values) -> Run:
    from flash_attn_interface import flash_attn_func

    _lacks("FlashAttention-3", case, "bias", "key_mask", "dropout")
    q, k, v = _rows(values)
    return lambda: _first(flash_attn_func(q, k, v, causal=case.causal))


def flash_attention_4(case: Any, values: Values) -> Run:
    from flash_attn.cute import flash_attn_func

    _lacks("FlashAttention-4", case, "bias", "key_mask", "dropout")
    q, k, v = _rows(values)
    return lambda: _first(flash_attn_func(q, k, v, causal=case.causal))


def xformers(case: Any, values: Values) -> Run:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    _lacks("xformers' operator", case, "key_mask")
    if case.group > 1 or (case.causal and values["bias"] is not None):
        raise ValueError("no adapter for xformers with grouped heads, or causal with a bias")
    q, k, v = _rows(values)
    bias = values["bias"]
    if bias is not None:
        bias = bias.expand(case.batch, -1, -1, -1)
    mask = LowerTriangularMask() if case.causal else bias
    return lambda: _first(memory_efficient_attention(q, k, v, attn_bias=mask, p=case.dropout_p))


def transformer_engine(case: Any, values: Values) -> Run:
    from transformer_engine.pytorch import DotProductAttention

    _lacks("TransformerEngine's adapter here", case, "bias", "key_mask", "decode")
    attend = DotProductAttention(
        case.heads,
        case.D,
        num_gqa_groups=case.heads // case.group,
        attention_dropout=case.dropout_p,
        qkv_format="bshd",
        attn_mask_type="causal" if case.causal else "no_mask",
    )
    q, k, v = _rows(values)
    return lambda: _first(attend(q, k, v).unflatten(-1, (case.heads, case.D)))


def flex_attention(case: Any, values: Values) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _lacks("FlexAttention", case, "dropout")
    q, bias, key_mask = values["q"], values["bias"], values["key_mask"]
    if not q.is_cuda:
        raise ValueError("FlexAttention is compiled, which takes a CPU half a minute")

    def visible(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        seen = t >= s if case.causal else s >= 0
        return seen if key_mask is None else seen & key_mask[b, s]

    def biased(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return score + bias[0, h, t, s]

    batches = None if key_mask is None else case.batch
    block_mask = None
    if case.causal or key_mask is not None:
        block_mask = create_block_mask(visible, batches, None, case.T, case.S, device=q.device)
    attend: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    return lambda: attend(
        *(q, values["k"], values["v"]),
        score_mod=None if bias is None else biased,
        block_mask=block_mask,
        enable_gqa=case.group > 1,
    )


def formula(compiled: bool, case: Any, values: Values) -> Run:
    """What a textbook has, in eager PyTorch or compiled."""
    check_scores(case)
    q = values["q"]
    if compiled:
        check_compiles()
    group, scale = case.group, case.D**-0.5
    key_mask, bias = values["key_mask"], values["bias"]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        k, v = (t.repeat_interleave(group, 1) if group > 1 else t for t in (k, v))
        score = q @ k.transpose(-2, -1) * scale
        if bias is not None:
            score = score + bias
        if case.causal:
            hidden = torch.ones(case.T, case.S, dtype=torch.bool, device=q.device).triu(1)
            score = score.masked_fill(hidden, float("-inf"))
        if key_mask is not None:
            score = score.masked_fill(~key_mask[:, None, None, :], float("-inf"))
        weights = torch.dropout(score.softmax(-1), case.dropout_p, True)
        shown = weights.detach().mean(1) if "weights" in case.features else None
        return weights @ v, shown

    run = torch.compile(attend, dynamic=False) if compiled else attend
    return lambda: first(run(q, values["k"], values["v"]))


PEERS = [
    Contestant("eager", partial(formula, False)),
    Contestant("compiled", partial(formula, True), compiles=True),
    Contestant("flex", flex_attention, compiles=True),
    Contestant("flash-attn-2", flash_attention_2),
    Contestant("flash-attn-3", flash_attention_3),
    Contestant("flash-attn-4", flash_attention_4, compiles=True),
    Contestant("xformers", xformers),
    Contestant("transformer-engine", transformer_engine),
]
