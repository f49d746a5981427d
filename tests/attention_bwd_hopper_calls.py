"""Attentions whose gradients reach every branch of the Hopper backward, whose tiles are larger than
those that ``attention_bwd_calls.py`` is made for.
"""

from __future__ import annotations

from typing import Any

from tests.attention_bwd_calls import CALLS, FEATURES, KERNELS, Call, Dout
from tests.attention_calls import BF16, DTYPES, F16, F32, Layout

HEAD_DIMS = (64, 96, 128)
"""Of csrc/kernels/attention_bwd_tuning_sm90.h."""
KINDS: dict[str, dict[str, Any]] = {"plain": {"upper": 230}, "general": FEATURES}
INSTANTIATIONS = [
    Call(f"{kind}, {name} {D}", 330, 300, D, dtype=dtype, H=1, **features)
    for D in HEAD_DIMS
    for name, dtype in DTYPES.items()
    for kind, features in KINDS.items()
]
"""Each of them, with more tiles of queries than stages, and several blocks of keys."""
HOPPER_CALLS = [
    *INSTANTIATIONS,
    Call("causal", 400, 400, 128, H=2, upper=0, needs_dbias=False),
    Call("causal of 64 columns", 400, 400, 64, H=2, upper=0, dout=Dout.PACKED),
    Call("causal of 96 columns", 400, 400, 96, H=2, group=2, upper=0),
    Call("queries that see no key", 300, 200, 128, H=1, upper=-150),
    Call("keys that no query sees", 100, 500, 64, H=1, upper=0),
    Call("the same with a softcap", 100, 500, 64, H=1, upper=0, softcap=4.0),
    Call("window: both ends", 400, 600, 128, H=1, lower=-100, upper=230),
    Call("narrow window", 300, 300, 64, lower=-20, upper=5),
    Call("narrow window, general", 300, 300, 128, H=1, lower=-20, upper=5, softcap=2.0),
    Call("full tiles alone", 256, 256, 128, H=1, dlse=False),
    Call("one query", 1, 300, 128, B=2),
    Call("one key", 300, 1, 64),
    Call("heads of a group", 200, 300, 128, B=2, H=6, group=3, upper=100),
    Call("heads of a group, 64 columns", 200, 300, 64, H=4, group=4),
    Call("narrower v", 140, 200, 128, 72),
    Call("wider v", 140, 200, 40, 128, F16),
    Call("columns that end in a slab", 140, 200, 88, 96, upper=60),
    Call("the same of 128 columns", 140, 200, 88, 120, upper=60),
    Call("packed heads", 140, 200, 64, B=2, layout=Layout.PACKED, upper=60),
    Call("scores of 1e5", 140, 200, 128, H=1, size=300.0),
    Call("scores of -1e5: keys behind the last", 70, 70, 64, H=1, size=300.0, scale=2.0),
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
SMALL_CALLS = [
    call
    for call in CALLS
    if call not in KERNELS and max(call.D, call.values) <= HEAD_DIMS[-1] and call.B and call.T
]
"""Every feature by itself, in one tile or two."""
