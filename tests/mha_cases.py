"""Calls of nn.MultiheadAttention as data, and what stock answers to them without NaN."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fused_lm
from tests.modules import Change, check_against_stock

MASKS = ("none", "bool", "bool 3d", "float", "float 3d", "float -inf", "causal", "causal bool")
PADDINGS = ("none", "bool", "float", "float -inf", "all of one")


@dataclass(frozen=True)
class Case:
    """One module and one call of it; the defaults are the commonest ones.

    Attributes:
        same: Which of query, key and value are one tensor: "qkv", "kv" or "".
        hides_rows: Whether masks may hide every key from a row.
        wrong: A mistake that torch answers with an error, or "".
    """

    heads: int = 2
    head_dim: int = 8
    kdim: int | None = None
    vdim: int | None = None
    bias: bool = True
    add_bias_kv: bool = False
    add_zero_attn: bool = False
    batch_first: bool = True
    dropout: float = 0.0
    N: int | None = 2
    T: int = 5
    S: int = 7
    same: str = ""
    mask: str = "none"
    padding: str = "none"
    hides_rows: bool = False
    need_weights: bool = True
    average: bool = True
    is_causal: bool = False
    training: bool = True
    grad: bool = True
    autocast: bool = False
    dtype: torch.dtype = torch.float32
    wrong: str = ""
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """Arguments of the constructor."""
        return {
            "embed_dim": self.heads * self.head_dim,
            "num_heads": self.heads,
            "dropout": self.dropout,
            "bias": self.bias,
            "add_bias_kv": self.add_bias_kv,
            "add_zero_attn": self.add_zero_attn,
            "kdim": self.kdim,
            "vdim": self.vdim,
            "batch_first": self.batch_first,
        }

    def normal(self) -> Case:
        """The case with what can't be combined put right."""
        case = self
        if case.same == "qkv":
            case = replace(case, S=case.T, kdim=None, vdim=None)
        elif case.same == "kv" and case.kdim != case.vdim:
            case = replace(case, vdim=case.kdim)
        return case


def modules(case: Case, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """torch's module and ours with the same random parameters."""
    torch.manual_seed(case.seed)
    stock = nn.MultiheadAttention(**case.options(), device=device, dtype=case.dtype)
    ours = fused_lm.nn.MultiheadAttention(**case.options(), device=device, dtype=case.dtype)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.normal_(std=0.4)
    ours.load_state_dict(stock.state_dict())
    return stock.train(case.training), ours.train(case.training)


def inputs(case: Case, device: torch.device) -> tuple[list[Tensor], dict[str, Any]]:
    """(query, key, value) and the other arguments of forward."""
    torch.manual_seed(case.seed + 1)
    E = case.heads * case.head_dim
    widths = (E, case.kdim or E, case.vdim or E)
    shapes = []
    for rows, width in zip((case.T, case.S, case.S), widths, strict=True):
        batched = (case.N or 1, rows) if case.batch_first else (rows, case.N or 1)
        shapes.append((rows, width) if case.N is None else (*batched, width))
    tensors = [torch.randn(shape, device=device).to(case.dtype) for shape in shapes]
    if case.same:
        tensors[2] = tensors[1]
    if case.same == "qkv":
        tensors[0] = tensors[1]
    arguments = {
        "attn_mask": _mask(case, device),
        "key_padding_mask": _padding(case, device),
        "need_weights": case.need_weights,
        "average_attn_weights": case.average,
        "is_causal": case.is_causal,
    }
    if case.wrong:
        _spoil(case, tensors, arguments)
    return tensors, arguments


def _spoil(case: Case, tensors: list[Tensor], arguments: dict[str, Any]) -> None:
    """Plants the mistake that the case names."""
    device = tensors[0].device
    mistakes: dict[str, Any] = {
        "mask shape": ("attn_mask", torch.zeros(case.T + 1, case.S, device=device)),
        "mask 3d shape": ("attn_mask", torch.zeros(9, case.T, case.S, device=device)),
        "mask dtype": ("attn_mask", torch.zeros(case.T, case.S, dtype=torch.int64, device=device)),
        "mask fp64": ("attn_mask", torch.zeros(case.T, case.S, device=device).double()),
        "padding shape": ("key_padding_mask", torch.zeros(5, 11, device=device).bool()),
        "padding dims": ("key_padding_mask", torch.zeros(1, 1, 1, 1, device=device).bool()),
        "padding dtype": ("key_padding_mask", torch.zeros(case.N or 1, case.S).long()),
        "hint alone": ("attn_mask", None),
    }
    if case.wrong in mistakes:
        name, value = mistakes[case.wrong]
        arguments[name] = value
        arguments["is_causal"] = arguments["is_causal"] or case.wrong == "hint alone"
    elif case.wrong == "dims":
        tensors[0] = tensors[0][None, None]
    elif case.wrong == "width":
        tensors[0] = tensors[0][..., 1:]
    elif case.wrong == "lengths":
        tensors[2] = torch.cat([tensors[2], tensors[2]], -2)
    elif case.wrong == "dtype":
        tensors[1] = tensors[1].double()


WRONG = (
    "mask shape", "mask 3d shape", "mask dtype", "mask fp64", "padding shape", "padding dims",
    "padding dtype", "hint alone", "dims", "width", "lengths", "dtype",
)  # fmt: skip


def _mask(case: Case, device: torch.device) -> Tensor | None:
    T, S = case.T, case.S
    count = (case.N or 1) * case.heads
    if case.mask == "none":
        return None
    if case.mask.startswith("causal"):
        hidden = torch.ones(T, S, device=device).triu(1).bool()
        if case.mask == "causal bool":
            return hidden
        return torch.zeros(T, S, device=device).masked_fill(hidden, float("-inf")).to(case.dtype)
    shape = (count, T, S) if case.mask.endswith("3d") else (T, S)
    hidden = torch.rand(shape, device=device) < (0.6 if case.hides_rows else 0.3)
    if not case.hides_rows and S > 0:
        hidden[..., 0] = False
    if case.hides_rows and T > 0:
        hidden[..., 0, :] = True
    if case.mask.startswith("bool"):
        return hidden
    if case.mask == "float -inf":
        return torch.zeros(shape, device=device).masked_fill(hidden, float("-inf")).to(case.dtype)
    return torch.randn(shape, device=device).to(case.dtype)


def _padding(case: Case, device: torch.device) -> Tensor | None:
    """The first key stays visible, unless rows may be hidden."""
    if case.padding == "none":
        return None
    N, S = case.N or 1, case.S
    hidden = torch.rand(N, S, device=device) < 0.4
    if S > 0:
        hidden[:, 0] = case.hides_rows and case.mask != "none"
    if case.padding == "all of one" and case.hides_rows and N > 0:
        hidden[-1] = True
    if case.N is None:
        hidden = hidden[0]
    if case.padding in ("bool", "all of one"):
        return hidden
    if case.padding == "float -inf":
        zeros = torch.zeros(hidden.shape, device=device)
        return zeros.masked_fill(hidden, float("-inf")).to(case.dtype)
    return torch.randn(hidden.shape, device=device).to(case.dtype)


def answer(module: nn.Module, case: Case, tensors: list[Tensor], arguments: Any) -> list[Tensor]:
    """Outputs and gradients by name order: out, weights, then of inputs, masks and parameters."""
    distinct = {id(t): t.detach().clone().requires_grad_(case.grad) for t in tensors}
    leaves = [distinct[id(t)] for t in tensors]
    arguments = dict(arguments)
    points = list(distinct.values())
    for name in ("attn_mask", "key_padding_mask"):
        mask = arguments[name]
        if mask is not None and mask.is_floating_point() and case.grad:
            arguments[name] = mask.detach().clone().requires_grad_()
            points.append(arguments[name])
    autocast = torch.autocast(leaves[0].device.type, torch.bfloat16, enabled=case.autocast)
    with torch.set_grad_enabled(case.grad), autocast:
        out, weights = module(*leaves, **arguments)
    outputs = [out] if weights is None else [out, weights]
    if not case.grad:
        return [t.detach() for t in outputs]
    points.extend(module.parameters())
    total = sum((t.double() * _slope(t)).sum() for t in outputs)
    grads = torch.autograd.grad(total, points, allow_unused=True)
    zeros = (torch.zeros_like(p) if g is None else g for p, g in zip(points, grads, strict=True))
    return [t.detach() for t in (*outputs, *zeros)]


def _slope(t: Tensor) -> Tensor:
    return torch.linspace(-1, 1, max(t.numel(), 1), device=t.device)[: t.numel()].view(t.shape)


def oracle(module: nn.Module, case: Case, tensors: list[Tensor], arguments: Any) -> list[Tensor]:
    """What stock answers, with zeros for NaN: of rows without a key only
    scaled_dot_product_attention, which returns no weights, knows the value and the gradients.
    """
    found = answer(module, case, tensors, arguments)
    if not any(bool(torch.isnan(t).any()) for t in found):
        return found
    plain = {**arguments, "need_weights": False, "is_causal": False}
    with _no_native_path():
        safe = answer(module, case, tensors, plain)
        if not case.need_weights:
            return safe
        per_head = {**arguments, "is_causal": False, "average_attn_weights": False}
        weights = answer(module, replace(case, grad=False), tensors, per_head)[1].nan_to_num(0.0)
    return [safe[0], weights.mean(-3) if case.average else weights, *safe[1:]]


@contextlib.contextmanager
def _no_native_path() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def compare(case: Case, backend: str, device: torch.device) -> None:
    """Ours against stock on one case: values and gradients, the bits where nothing of ours runs,
    layout, or the error.
    """
    stock, ours = modules(case, device)
    compare_modules(stock, ours, case, backend, device)


def compare_modules(stock: Any, ours: Any, case: Case, backend: str, device: torch.device) -> None:
    tensors, arguments = inputs(case, device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(case.seed)
        try:
            expected, error = answer(stock, case, tensors, arguments), None
        except Exception as raised:
            expected, error = [], raised
    wanted = sorted({str(w.message) for w in caught})
    with warnings.catch_warnings(record=True) as caught, fused_lm.use_backend(backend):
        warnings.simplefilter("always")
        torch.manual_seed(case.seed)
        if error is not None:
            _check_error(error, ours, case, tensors, arguments)
            return
        got = answer(ours, case, tensors, arguments)
    assert sorted({str(w.message) for w in caught}) == wanted
    assert got[0].is_contiguous() or not expected[0].is_contiguous()
    nan = any(bool(torch.isnan(t).any()) for t in expected)
    if backend in ("auto", "pytorch") and device.type == "cpu":
        _check_bits(got, expected, nan)
        if not nan:
            return
    if nan and case.need_weights:  # then only the output's own gradient has an oracle
        got = _of_output_alone(ours, case, tensors, arguments, backend, got)

    def run(module: nn.Module, change: Change) -> list[Tensor]:
        exactly = replace(case, autocast=case.autocast and change is not Tensor.double)
        return oracle(module, exactly, *_mapped(change, tensors, arguments))

    eps = torch.finfo(torch.bfloat16 if case.autocast else case.dtype).eps
    check_against_stock(stock, got, run, eps)


def _of_output_alone(
    ours: nn.Module, case: Case, tensors: list[Tensor], arguments: Any, backend: str, got: Any
) -> list[Tensor]:
    weights = got[1]
    with fused_lm.use_backend(backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = answer(_WithoutWeights(ours), case, tensors, arguments)
    return [alone[0], weights, *alone[1:]]


class _WithoutWeights(nn.Module):
    """The same call, but the loss doesn't see the weights."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return self.module(*args, **kwargs)[0], None


def _check_error(error: Exception, ours: Any, case: Case, tensors: Any, arguments: Any) -> None:
    try:
        answer(ours, case, tensors, arguments)
    except Exception as raised:
        assert type(raised) is type(error), f"{raised!r} instead of {error!r}"
        assert str(raised) == str(error)
    else:
        raise AssertionError(f"stock raises {error!r}, ours doesn't")


def _check_bits(got: list[Tensor], expected: list[Tensor], nan: bool) -> None:
    """The same bits but where stock has NaN; a NaN in a row spoils every gradient."""
    for index, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        if nan and index > 1:
            break
        same = (mine == theirs) | torch.isnan(theirs)
        assert bool(same.all()), f"result {index} differs in {int((~same).sum())} places"
        assert not bool(torch.isnan(mine).any())


def _mapped(change: Change, tensors: list[Tensor], arguments: Any) -> tuple[list[Tensor], Any]:
    """``change`` of every float tensor; what was one tensor stays one."""
    distinct = {id(t): change(t) for t in tensors}
    masks = {
        name: change(v) if isinstance(v, Tensor) and v.is_floating_point() else v
        for name, v in arguments.items()
    }
    return [distinct[id(t)] for t in tensors], masks
