"""Attentions whose gradients reach every branch of the Hopper backward, whose tiles are larger than
those that ``attention_bwd_calls.py`` is made for.
"""

from __future__ import annotations

from typing import Any

from tests.attention_bwd_calls import CALLS, FEATURES, KERNELS, Call, Dout
from tests.attention_calls import DTYPES, F16, F32, Layout

HEAD_DIMS = (64, 96, 128, 192, 256)
"""Of csrc/kernels/attention_bwd_tuning_sm90.h."""
GROUPS, GROUP_ROWS = 2, 64
"""Of consumers, and the rows of their products."""
WIDE = 128
"""Above it a block has 64 keys instead of 128, and tiles of 128 queries."""


def _instantiation(kind: str, name: str, D: int) -> Call:
    T, S, upper = (330, 300, 230) if D <= WIDE else (270, 70, 20)
    features: dict[str, Any] = {"upper": upper} if kind == "plain" else FEATURES
    return Call(f"{kind}, {name} {D}", T, S, D, dtype=DTYPES[name], H=1, **features)


INSTANTIATIONS = [
    _instantiation(kind, name, D)
    for D in HEAD_DIMS
    for name in DTYPES
    for kind in ("plain", "general")
] + [
    Call(f"no band, {name} 128", 330, 300, 128, dtype=dtype, H=1) for name, dtype in DTYPES.items()
]
"""Each of them, with more tiles of queries than stages, and several blocks of keys."""
LONG_ROWS = 80
"""Queries of a tile where no band hides a key, at 128 columns; a call has as many at least."""
EVERY: dict[str, Any] = {
    "B": 2,
    "H": 4,
    "group": 2,
    "lower": -90,
    "upper": 130,
    "mask": "BHTS",
    "key_mask": True,
    "bias": "BHTS",
    "bias_dtype": F32,
    "scale": 0.2,
    "softcap": 4.0,
    "dropout_p": 0.2,
}
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
    Call("heads of a group", 130, 140, 128, H=4, group=2, upper=100),
    Call("heads of a group, 64 columns", 200, 300, 64, H=4, group=4),
    Call("narrower v", 140, 200, 128, 72),
    Call("wider v", 140, 200, 40, 128, F16),
    Call("columns that end in a slab", 140, 200, 88, 96, upper=60),
    Call("the same of 128 columns", 140, 200, 88, 120, upper=60),
    Call("columns of 192 that end in a half", 140, 100, 136, 88, upper=60),
    Call("columns of 256 that end in a half, and wider v", 140, 100, 40, 200, F16, H=1),
    Call("wide and causal, heads of a group", 200, 200, 256, H=2, group=2, upper=0),
    Call("wide: queries and keys without a partner", 250, 200, 192, H=1, upper=-160),
    Call("wide: keys that no query sees", 100, 300, 192, H=1, upper=0, dout=Dout.PACKED),
    Call("wide: full tiles alone", 256, 128, 256, H=1, dlse=False),
    Call("wide: one query", 1, 150, 192, B=2),
    Call("wide: one key, packed heads", 150, 1, 256, layout=Layout.PACKED),
    Call("wide: scores of 1e4", 140, 100, 256, H=1, size=100.0),
    Call("wide: scores of -1e5: keys behind the last", 70, 40, 192, H=1, size=100.0, scale=2.0),
    Call("packed heads", 140, 200, 64, B=2, layout=Layout.PACKED, upper=60),
    Call("scores of 1e5", 140, 200, 128, H=1, size=300.0),
    Call("scores of -1e5: keys behind the last", 70, 70, 64, H=1, size=300.0, scale=2.0),
    Call("every feature, heads of a group, ragged", 150, 278, 128, 96, **{**EVERY, "H": 2}),
    Call("the same of 256 columns", 150, 150, 256, 176, **{**EVERY, "H": 2}),
    Call("the same of 192 columns, wider v", 150, 70, 144, 192, F16, **{**EVERY, "H": 2}),
]
SMALL_CALLS = [
    call
    for call in CALLS
    if call not in KERNELS and max(call.D, call.values) <= HEAD_DIMS[-1] and call.B and call.T
]
"""Every feature by itself, in one tile or two."""


def operands_of_group(D: int, block_t: int, block_s: int) -> int:
    """Elements that a group's products of a tile read in shared memory. Scores and dP: 64 keys and
    the queries; dv and dk: the queries; dq: 64 columns of all keys, and ds of its queries. Of 96
    columns the second group makes 64, and adds 32.

    Above 128 columns scores and dP: 64 queries and the keys; dv and dk: P or ds, and half of the
    columns of the queries; dq: the keys.
    """
    if D > WIDE:
        scores, sums = 2 * (GROUP_ROWS + block_s) * D, 2 * block_t * (block_s + D // GROUPS)
        return scores + sums + block_s * D
    queries = block_t if D > GROUP_ROWS else block_t // GROUPS
    return 2 * (GROUP_ROWS + block_t) * D + 2 * block_t * D + block_s * (GROUP_ROWS + queries)
