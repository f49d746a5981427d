"""The attention function and the masks that transformers calls, against the formula."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import (
    causal_mask_function,
    sdpa_mask,
    sliding_window_overlay,
)

import fused_lm
from fused_lm.integrations import huggingface as hf
from fused_lm.tolerance import check_close
from tests.gpu import INTERPRETER, needs_interpreter

HAS_NOTES = "q_offset" in inspect.signature(sdpa_mask).parameters
B, HEADS, T = 3, 4, 9


def captured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keyword arguments of every call of fused_lm.attention from now on."""
    calls: list[dict[str, Any]] = []

    def attention(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return fused_lm.attention(*args, **kwargs)

    monkeypatch.setattr(hf, "attention", attention)
    return calls


@needs_interpreter
@pytest.mark.skipif(not HAS_NOTES, reason="masks aren't told where the queries start")
def test_a_note_is_true_or_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = torch.arange(T) >= torch.tensor([[0], [3], [5]])
    sizes = {"batch_size": B, "q_length": 4, "kv_length": T, "q_offset": T - 4, "device": "cpu"}
    options = {**sizes, "attention_mask": shown, "mask_function": causal_mask_function}
    mask = hf.make_mask(**options)
    note = getattr(mask, hf.NOTE)
    expected = shown[:, None, None] & (torch.arange(T) <= torch.arange(T - 4, T)[:, None])
    assert torch.equal(mask, expected) and note.causal == "bottom_right"
    q, k = torch.randn(B, HEADS, 4, 8), torch.randn(B, 2, T, 8)
    hf.register()
    calls = captured(monkeypatch)
    with fused_lm.use_backend("triton"):
        noted = hf.attention_forward(nn.Identity(), q, k, k, mask)[0]
        plain = hf.attention_forward(nn.Identity(), q, k, k, mask.clone())[0]
        torch.testing.assert_close(noted, plain)
        mask[:, :, :, 5] = True
        hf.attention_forward(nn.Identity(), q, k, k, mask)
    assert ["mask" in call for call in calls] == [False, True, True]
    for other in ({"mask_function": sliding_window_overlay(3)}, {"q_offset": 1}, {"kv_offset": 1}):
        assert not hasattr(hf.make_mask(**{**options, **other}), hf.NOTE)


def _plain(q: Tensor, k: Tensor, v: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """softmax(change(q k^T)) v as [B, T, H, D]; rows that hide every key are 0."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    weights = change(q @ k.mT).softmax(-1).nan_to_num()
    return (weights @ v).transpose(1, 2)


def _tril(scores: Tensor, diagonal: int = 0, width: int = 99) -> Tensor:
    shown = torch.ones_like(scores, dtype=torch.bool).tril(diagonal)
    return scores.masked_fill(~shown.triu(diagonal - width + 1), float("-inf"))


HIDDEN = torch.ones(B, 1, 6, 6, dtype=torch.bool).tril()
HIDDEN[0, :, :, :3] = False
LOWEST = torch.zeros(HIDDEN.shape).masked_fill(~HIDDEN, torch.finfo(torch.float32).min)
BIAS = torch.linspace(-2, 2, HEADS * 36).view(1, HEADS, 6, 6).sin()
CALLS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "scale": ({"scaling": 0.7, "is_causal": False}, lambda s: s * 0.7),
    "default scale, causal module": ({}, lambda s: _tril(s * 8**-0.5)),
    "softcap": ({"scaling": 1.0, "softcap": 2.0}, lambda s: _tril(2 * (s / 2).tanh())),
    "window": ({"scaling": 1.0, "sliding_window": 2}, lambda s: _tril(s, 0, 2)),
    "bias": ({"scaling": 1.0, "position_bias": BIAS}, lambda s: _tril(s + BIAS.to(s))),
    "bool mask, window inside": (
        {"scaling": 1.0, "attention_mask": HIDDEN, "sliding_window": 2},
        lambda s: s.masked_fill(~HIDDEN, float("-inf")),
    ),
    "bool mask and bias": (
        {"scaling": 1.0, "attention_mask": HIDDEN, "position_bias": BIAS},
        lambda s: (s + BIAS.to(s)).masked_fill(~HIDDEN, float("-inf")),
    ),
    "float mask": ({"scaling": 1.0, "attention_mask": BIAS}, lambda s: s + BIAS.to(s)),
    "lowest number hides": (
        {"scaling": 1.0, "attention_mask": LOWEST, "position_bias": BIAS},
        lambda s: (s + BIAS.to(s)).masked_fill(~HIDDEN, float("-inf")),
    ),
    "longer mask": (
        {"scaling": 1.0, "attention_mask": F.pad(HIDDEN, (0, 3), value=True)},
        lambda s: s.masked_fill(~HIDDEN, float("-inf")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference", *INTERPRETER])
@pytest.mark.parametrize("call", CALLS)
def test_every_argument_against_the_formula(call: str, backend: str) -> None:
    q, k, v = torch.randn(B, HEADS, 6, 8), torch.randn(B, 2, 6, 8), torch.randn(B, 2, 6, 8)
    options, change = CALLS[call]
    options = {"attention_mask": None, **options}
    with fused_lm.use_backend(backend):
        out, weights = hf.attention_forward(nn.Identity(), q, k, v, **options)
    assert weights is None and out.is_contiguous()
    exact = _plain(*(t.double() for t in (q, k, v)), change)
    check_close(out, _plain(q, k, v, change), exact, call)


def test_one_query_and_more_keys_see_all() -> None:
    q, k = torch.randn(1, HEADS, 1, 8), torch.randn(B, HEADS, 6, 8)
    out, _ = hf.attention_forward(nn.Identity(), q, k, k, None, scaling=1.0)
    torch.testing.assert_close(out, _plain(q, k, k, lambda s: s))
    out, _ = hf.attention_forward(nn.Identity(), q, k, k, None, scaling=1.0, sliding_window=2)
    torch.testing.assert_close(out, _plain(q, k[:, :, -2:], k[:, :, -2:], lambda s: s))


@pytest.mark.parametrize("backend", ["auto", "reference", *INTERPRETER])
def test_weights_are_those_that_were_used(backend: str) -> None:
    module = nn.Identity()
    q, k = torch.randn(B, HEADS, 16, 8), torch.randn(B, 2, 16, 8)
    with fused_lm.use_backend(backend):
        out, weights = hf.attention_forward(
            module, q, k, k, None, dropout=0.5, output_attentions=True
        )
        assert weights is not None and weights.shape == (B, HEADS, 16, 16)
        seen = weights[:, :, torch.ones(16, 16).tril().bool()]
        assert 0.3 < (seen == 0).float().mean() < 0.7
        repeated = k.repeat_interleave(2, 1)
        torch.testing.assert_close(out, (weights @ repeated).transpose(1, 2))
        module.eval()
        _, weights = hf.attention_forward(
            module, q, k, k, None, dropout=0.5, output_attentions=True
        )
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, HEADS, 16))


@pytest.mark.parametrize("name", ["head_mask", "s_aux", "sinks", "block_indices", "cu_seq_lens_q"])
def test_what_would_be_ignored_raises(name: str) -> None:
    q = torch.randn(1, HEADS, 6, 8)
    given = {name: torch.tensor([0, 3, 6])}
    with pytest.raises(ValueError, match=name):
        hf.attention_forward(nn.Identity(), q, q, q, None, **given)


def test_transformers_is_imported_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import sys, fused_lm, fused_lm.lm, fused_lm.integrations.huggingface\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "transformers>=4\.57"'):
        hf.register()
