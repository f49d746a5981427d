"""Attention inside each of several packed sequences on Triton: the kernels of :mod:`.attention`,
one sequence after the other. Arguments are those of ``fused_lm.reference.attention_varlen``.
"""

from __future__ import annotations

from functools import partial

from fused_lm.reference.attention_varlen import backward_by, forward_by
from fused_lm.triton_kernels.attention import attention_backward, attention_forward

attention_varlen_forward = partial(forward_by, attention_forward)
attention_varlen_backward = partial(backward_by, attention_backward)
