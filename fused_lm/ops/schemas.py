"""Every operator schema of ``torch.ops.fused_lm``, defined once, at import.

Implementations are registered elsewhere: by ``ops/`` for the Python backends, by the C++ extension
for CUDA. A second definition of a schema does not raise, it kills the process, so nothing else may
define one.

``backend`` names the implementation that dispatch chose; it is an argument because a compiled graph
must run what was chosen when it was traced. Absent outputs are empty tensors.
"""

from __future__ import annotations

import hashlib

import torch

_SCORE = (
    "Tensor? mask, Tensor? key_mask, Tensor? bias, Tensor? rng,"
    " SymInt? lower, SymInt? upper, float scale, float softcap"
)

_PACKED = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt? lower, SymInt? upper,"
    " bool aligned_at_end, float scale, float softcap"
)

_LINEAR_BWD = (
    "Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor pre, str activation, bool transposed,"
    " bool needs_dx, bool needs_dbias, bool needs_dweight"
)
_LINEAR_GRADIENTS = "(Tensor dx, Tensor dweight, Tensor dbias)"
_FFN = "Tensor up_weight, Tensor? up_bias, Tensor down_weight, Tensor? down_bias"
_FFN_BWD = (
    f"Tensor dy, Tensor x, {_FFN}, Tensor pre, Tensor hidden, str activation, bool transposed,"
    " bool needs_dx, bool needs_dbiases, bool needs_dup, bool needs_ddown"
)
_FFN_GRADIENTS = (
    "(Tensor dx, Tensor dup_weight, Tensor dup_bias, Tensor ddown_weight, Tensor ddown_bias)"
)

_LOSS = "SymInt ignore_index, float label_smoothing, float z_loss, float softcap, str reduction"
_LINEAR_LOSS = (
    f"Tensor x, Tensor weight, Tensor? bias, Tensor target, {_LOSS}, int? chunk_rows,"
    " bool needs_dx, bool needs_dweight, bool needs_dbias, str backend"
)

SCHEMAS = {
    "attention_fwd": (
        f"(Tensor q, Tensor k, Tensor v, {_SCORE}, float dropout_p, str backend)"
        " -> (Tensor out, Tensor lse)"
    ),
    "attention_bwd": (
        "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
        f" {_SCORE}, float dropout_p, bool needs_dbias, str backend)"
        " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)"
    ),
    "attention_weights_fwd": (
        f"(Tensor q, Tensor k, Tensor lse, {_SCORE}, float dropout_p, bool average_heads,"
        " str backend) -> Tensor"
    ),
    "attention_decode_fwd": (
        "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_lens, Tensor? block_table,"
        " SymInt? lower, SymInt? upper, float scale, float softcap, str backend)"
        " -> (Tensor out, Tensor lse)"
    ),
    "attention_varlen_fwd": (
        f"(Tensor q, Tensor k, Tensor v, {_PACKED}, str backend) -> (Tensor out, Tensor lse)"
    ),
    "attention_varlen_bwd": (
        "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
        f" {_PACKED}, str backend) -> (Tensor dq, Tensor dk, Tensor dv)"
    ),
    "layer_norm_fwd": (
        "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? rng, float eps,"
        " float dropout_p, ScalarType out_dtype, ScalarType residual_dtype, str backend)"
        " -> (Tensor y, Tensor stream, Tensor mean, Tensor rstd)"
    ),
    "layer_norm_bwd": (
        "(Tensor dy, Tensor? dstream, Tensor stream, Tensor? weight, Tensor? bias, Tensor mean,"
        " Tensor rstd, Tensor? rng, float dropout_p, ScalarType x_dtype,"
        " ScalarType? residual_dtype, str backend)"
        " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
    ),
    "rms_norm_fwd": (
        "(Tensor x, Tensor? residual, Tensor? weight, Tensor? rng, float eps, float dropout_p,"
        " ScalarType out_dtype, ScalarType residual_dtype, str backend)"
        " -> (Tensor y, Tensor stream, Tensor rstd)"
    ),
    "rms_norm_bwd": (
        "(Tensor dy, Tensor? dstream, Tensor stream, Tensor? weight, Tensor rstd, Tensor? rng,"
        " float dropout_p, ScalarType x_dtype, ScalarType? residual_dtype, str backend)"
        " -> (Tensor dx, Tensor dresidual, Tensor dweight)"
    ),
    "rotary_fwd": (
        "(Tensor x, Tensor? k, Tensor cos, Tensor sin, Tensor? positions, bool interleaved,"
        " bool inverse, str backend) -> (Tensor y, Tensor k_turned)"
    ),
    "linear_act_fwd": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? weight_grad, str activation,"
        " bool transposed, bool keep_pre, str backend) -> (Tensor y, Tensor pre)"
    ),
    "linear_act_bwd": f"({_LINEAR_BWD}, str backend) -> {_LINEAR_GRADIENTS}",
    "linear_act_bwd_add": (
        f"({_LINEAR_BWD}, Tensor(a!) weight_grad, str backend) -> {_LINEAR_GRADIENTS}"
    ),
    "linear_residual_fwd": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor? rng, float dropout_p,"
        " bool transposed, str backend) -> Tensor"
    ),
    "linear_residual_bwd": (
        "(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? rng, float dropout_p,"
        " bool transposed, bool needs_dx, bool needs_dbias, bool needs_dweight, str backend)"
        f" -> {_LINEAR_GRADIENTS}"
    ),
    "ffn_fwd": (
        f"(Tensor x, {_FFN}, Tensor? up_weight_grad, Tensor? down_weight_grad, str activation,"
        " bool transposed, bool keep_pre, bool keep_hidden, str backend)"
        " -> (Tensor y, Tensor pre, Tensor hidden)"
    ),
    "ffn_bwd": f"({_FFN_BWD}, str backend) -> {_FFN_GRADIENTS}",
    "ffn_bwd_add": (
        f"({_FFN_BWD}, Tensor(a!)? up_weight_grad, Tensor(b!)? down_weight_grad, str backend)"
        f" -> {_FFN_GRADIENTS}"
    ),
    "cross_entropy_fwd": (
        f"(Tensor logits, Tensor target, {_LOSS}, str gradient, str backend)"
        " -> (Tensor loss, Tensor dlogits)"
    ),
    "cross_entropy_bwd": (
        f"(Tensor dloss, Tensor logits, Tensor target, {_LOSS}, str backend) -> Tensor"
    ),
    "linear_cross_entropy_fwd": (
        f"({_LINEAR_LOSS})"
        " -> (Tensor loss, Tensor row_weight, Tensor dx, Tensor dweight, Tensor dbias)"
    ),
    "linear_cross_entropy_bwd": (
        f"(Tensor dloss, {_LINEAR_LOSS}) -> (Tensor dx, Tensor dweight, Tensor dbias)"
    ),
}

_IN_CUDA = (
    *("attention_fwd", "attention_bwd", "attention_weights_fwd", "attention_decode_fwd"),
    *("attention_varlen_fwd", "attention_varlen_bwd"),
    *("layer_norm_fwd", "layer_norm_bwd", "rms_norm_fwd", "rms_norm_bwd"),
    *("linear_act_fwd", "linear_act_bwd", "linear_act_bwd_add"),
    *("linear_residual_fwd", "linear_residual_bwd"),
    *("cross_entropy_fwd", "cross_entropy_bwd"),
)
CUDA_SCHEMAS = {f"cuda_{name}": SCHEMAS[name].replace(", str backend)", ")") for name in _IN_CUDA}
CUDA_SCHEMAS |= {
    "cuda_attention_bwd_sm90": CUDA_SCHEMAS["cuda_attention_bwd"].replace(
        "bool needs_dbias)", "bool needs_dbias, SymInt dq_slots)"
    ),
    "cuda_ffn_dpre": (
        "(Tensor dy, Tensor weight, Tensor pre, str activation, bool transposed, bool needs_dbias)"
        " -> (Tensor dpre, Tensor dbias)"
    ),
    "cuda_cross_entropy_bwd_in_place": (
        f"(Tensor dloss, Tensor(a!) logits, Tensor target, {_LOSS}) -> ()"
    ),
    "cuda_cross_entropy_rows_in_place": (
        "(Tensor(a!) logits, Tensor target, Tensor(b!) loss, Tensor? weights,"
        " SymInt ignore_index, float label_smoothing, float z_loss, float softcap, bool gradient)"
        " -> ()"
    ),
    "cuda_cross_entropy_scale_in_place": "(Tensor(a!) dlogits, Tensor dloss) -> ()",
}
"""What the C++ extension implements: the operators above without ``backend``, behind the backend
``cuda``; the backward of attention a second time, for Hopper and with the way it adds up dq; the
part of an ``ffn``'s backward that ``linear_act`` doesn't have; and what overwrites memory, which
operators call with nobody looking on.
"""

_ALL = {**SCHEMAS, **CUDA_SCHEMAS}
SCHEMA_HASH = hashlib.sha256(repr(sorted(_ALL.items())).encode()).hexdigest()[:16]
"""Built into the C++ extension; a mismatch at load means a stale build."""

LIBRARY = torch.library.Library("fused_lm", "DEF")
for _name, _schema in _ALL.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
