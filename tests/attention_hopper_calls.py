"""Attentions that reach every branch of the Hopper forward, whose tiles are larger than those that
``attention_calls.py`` is made for.
"""

from __future__ import annotations

from typing import Any

from tests.attention_calls import BF16, CALLS, DTYPES, F16, F32, FEATURES, KERNELS, Call, Layout

HEAD_DIMS = (64, 96, 128, 192, 256)
"""Of csrc/kernels/attention_tuning_sm90.h."""
KINDS: dict[str, dict[str, Any]] = {"plain": {"upper": 230}, "general": FEATURES}
INSTANTIATIONS = [
    Call(f"{kind}, {name} {D}", 200, 400, D, dtype=dtype, H=1, **features)
    for D in HEAD_DIMS
    for name, dtype in DTYPES.items()
    for kind, features in KINDS.items()
]
"""Each of them, with more tiles of queries than multiprocessors here, and more tiles of keys than
stages.
"""
HOPPER_CALLS = [
    *INSTANTIATIONS,
    Call("causal: tiles of every length, longest first", 600, 600, 128, H=3, upper=0),
    Call("causal, three groups: the first pass over tiles", 500, 500, 64, H=2, upper=0),
    Call("a group that sees no key", 400, 300, 64, H=1, upper=-150),
    Call("the same in sequence", 400, 300, 192, H=1, upper=-150, softcap=4.0),
    Call("causal, out in q's place", 300, 300, 192, upper=0),
    Call("window: masked tiles at both ends", 300, 700, 128, H=1, lower=-100, upper=430),
    Call("narrow window, no whole tile", 300, 300, 128, lower=-20, upper=5),
    Call("query tiles without a key between those with", 500, 60, 128, H=2, lower=-300, upper=-90),
    Call("query tiles without a key, out in q's place", 500, 40, 256, H=1, upper=-280),
    Call("query tiles without a key, three groups", 500, 20, 64, H=1, upper=-280),
    Call("keys end within a full tile", 130, 300, 128, H=1),
    Call("keys fill their tiles", 128, 352, 128, H=1),
    Call("one query per head, many heads", 1, 300, 128, B=2, H=4, group=4),
    Call("one key", 70, 1, 96),
    Call("maxima that grow from tile to tile", 130, 900, 128, H=1, size=3.0),
    Call("the same in 16 bits of fp16", 130, 900, 64, H=1, size=3.0, dtype=F16),
    Call("scores of 1e9, fp16", 130, 300, 128, dtype=F16, size=1.2e4, H=1),
    Call("scores of 1e9, general", 130, 300, 128, size=1.2e4, H=1, softcap=1e12),
    Call("heads of a group share keys", 140, 200, 128, B=2, H=4, group=2, upper=60),
    Call("narrower v", 140, 200, 128, 72),
    Call("wider v", 140, 200, 40, 128, F16),
    Call("slabs of 32 columns", 140, 200, 88, 96, upper=60),
    Call("packed heads", 140, 200, 64, B=2, layout=Layout.PACKED, upper=60),
    Call(
        "every feature, heads of a group, ragged",
        *(150, 278, 128, 96, BF16),
        B=2,
        H=4,
        group=2,
        lower=-90,
        upper=130,
        mask="BHTS",
        key_mask=True,
        bias="BHTS",
        bias_dtype=F32,
        scale=0.2,
        softcap=4.0,
        dropout_p=0.2,
    ),
]
SMALL_CALLS = [call for call in CALLS if call not in KERNELS]
"""Every feature by itself, in one tile or two."""
