"""Fused models whose parts others have changed, and callers that trace, transform or nest."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize

import fused_lm
from fused_lm.nn import LayerNorm, MultiheadAttention, TransformerEncoderLayer
from tests import taken

C, H, N, T = 16, 2, 2, 5
BACKENDS = ("auto", "reference")


def _layer(**options: Any) -> Any:
    return nn.TransformerEncoderLayer(
        C, H, 2 * C, **{"batch_first": True, "dropout": 0.0, **options}
    )


def _left_padding() -> Tensor:
    padding = torch.zeros(N, T, dtype=torch.bool)
    padding[1, :2] = True
    return padding


CAUSAL = torch.ones(T, T).triu(1).bool()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("floats", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize("nested", [False, True])
def test_left_padded_causal_batches_are_not_nan(nested: bool, floats: bool, backend: str) -> None:
    """Stock's native operator of a layer is NaN there, and takes float masks unlike attention's."""
    stock = nn.TransformerEncoder(_layer(), 2, enable_nested_tensor=nested).eval()
    ours = copy.deepcopy(stock)
    fused_lm.fuse(ours)
    x = torch.randn(N, T, C)
    masks = [CAUSAL, _left_padding()]
    whole = torch.zeros(N, T, dtype=torch.bool)
    whole[1] = True
    if floats:
        masks = [torch.zeros(m.shape).masked_fill(m, -math.inf) for m in masks]
    with torch.no_grad(), fused_lm.use_backend(backend):
        got, wanted = ours(x, *masks), stock(x, *masks)
        assert torch.isfinite(ours(x, src_key_padding_mask=whole)).all()
    assert torch.isfinite(got).all() and torch.isnan(wanted[1]).any()
    torch.testing.assert_close(got[0], wanted[0])
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        torch.testing.assert_close(got, stock(x, *masks))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_mode_of_torch_functions_brings_no_nan_back() -> None:
    ours = MultiheadAttention(C, H, batch_first=True)
    padding = torch.zeros(N, T, dtype=torch.bool)
    padding[1] = True
    x = torch.randn(N, T, C)
    with torch.device("cpu"):
        out, weights = ours(x, x, x, key_padding_mask=padding)
    out[0].sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(weights).all()
    assert torch.isfinite(ours.in_proj_weight.grad).all()


class Foreign(nn.Module):
    """An attention of someone else's, with what stock's layer reads of it in training."""

    batch_first = True
    in_proj_bias = None

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(C, C)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **masks: Any) -> tuple[Any, None]:
        padding = masks["key_padding_mask"]
        assert padding is None or padding.is_floating_point()
        return self.linear(query), None


class Subclass(nn.MultiheadAttention):
    pass


def _odd_models() -> dict[str, nn.Module]:
    adapted, foreign, other, mixed = (_layer() for _ in range(4))
    adapted.linear1 = nn.Sequential(nn.Linear(C, 2 * C))
    foreign.self_attn = Foreign()
    other.self_attn = Subclass(C, H, batch_first=True)
    mixed.linear2.bfloat16()
    encoder = nn.TransformerEncoder(_layer(), 1, enable_nested_tensor=False)
    encoder.layers[0].self_attn = Foreign()
    return {
        "adapter": adapted, "foreign attention": foreign, "subclass of attention": other,
        "mixed dtypes": mixed, "encoder of foreign attention": encoder,
        "no features": nn.LayerNorm(0), "no features, RMS": nn.RMSNorm((0,)),
        "complex": nn.RMSNorm(8, dtype=torch.complex64),
        "script inside": nn.Sequential(torch.jit.trace(nn.Linear(C, C), torch.randn(1, C))),
    }  # fmt: skip


ODD = _odd_models()
RUN = ("adapter", "foreign attention", "subclass of attention", "encoder of foreign attention")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ODD)
def test_odd_models_are_reported_and_run(name: str, backend: str) -> None:
    stock = copy.deepcopy(ODD[name])
    ours = copy.deepcopy(stock)
    with fused_lm.use_backend(backend):
        assert str(fused_lm.fuse(ours))
        if name in RUN:
            x, padding = torch.randn(N, T, C), torch.arange(T).expand(N, T) > 3
            # In eval stock's layer reads the weights of its linears, whatever stands there.
            for training in (True,) if name == "adapter" else (True, False):
                wanted = stock.train(training)(x, src_key_padding_mask=padding)
                got = ours.train(training)(x, src_key_padding_mask=padding)
                torch.testing.assert_close(got, wanted)
    assert fused_lm.unfuse(ours) >= 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_leave_nested_tensors_to_torch(backend: str) -> None:
    x = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)])
    norm = nn.LayerNorm(8)
    wanted = [part.tolist() for part in norm(x).unbind()]
    fused_lm.fuse(norm)
    with fused_lm.use_backend(backend):
        assert [part.tolist() for part in norm(x).unbind()] == wanted


class _Calling(nn.Module):
    """A function of modules as a module, which a trace takes the parameters of."""

    def __init__(self, call: Any, *modules: nn.Module) -> None:
        super().__init__()
        self.call, self.held = call, nn.ModuleList(modules)

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.call(*tensors)


@pytest.mark.parametrize("kind", ["attention", "layer"])
def test_transforms_and_tracers_of_masked_calls(kind: str) -> None:
    """There Python can't look whether a row is hidden."""
    attention: Any = MultiheadAttention(C, H, batch_first=True)
    layer = _layer()
    fused_lm.fuse(layer)
    x, padding = torch.randn(3, N, T, C), torch.zeros(3, N, T, dtype=torch.bool)
    padding[1, 1] = True

    def call(x: Tensor, padding: Tensor) -> Tensor:
        if kind == "layer":
            return layer.eval()(x, src_key_padding_mask=padding)
        return attention(x, x, x, key_padding_mask=padding)[0]

    with torch.set_grad_enabled(kind == "attention"):
        each = torch.stack([call(*pair) for pair in zip(x, padding, strict=True)])
        assert torch.isfinite(each).all()
        torch.testing.assert_close(torch.func.vmap(call)(x, padding), each)
        traced = make_fx(call)(x[0], padding[0])
        torch.testing.assert_close(traced(x[1], padding[1]), each[1])
        graph = torch.jit.trace(
            _Calling(call, attention, layer), (x[0], padding[0]), check_trace=False
        )
        torch.testing.assert_close(graph(x[1], padding[1]), each[1])
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [mode.from_tensor(t) for t in (x[0], padding[0])]
            assert call(*fakes).shape == each[0].shape


def test_traced_modules_hold_torchs_operators() -> None:
    layer = _layer()
    fused_lm.fuse(layer)
    x = torch.randn(N, T, C)
    with fused_lm.use_backend("reference"):
        for module in (layer, LayerNorm(C)):
            graph = torch.jit.trace(module, x, check_trace=False)
            torch.testing.assert_close(graph(x), module(x))
            assert "fused_lm::" not in str(graph.inlined_graph)


@pytest.mark.parametrize(
    ("dynamic", "backend"),
    [
        pytest.param(dynamic, backend, marks=[] if backend == "auto" else [pytest.mark.slow])
        for dynamic in (True, None)
        for backend in ("auto", "pytorch", "reference")
    ],
)
def test_masked_calls_with_weights_compile(dynamic: bool | None, backend: str) -> None:
    ours = MultiheadAttention(C, H, batch_first=True)
    padding = torch.arange(T).expand(N, T) > 3
    x = torch.randn(N, T, C)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    wanted = ours(x, x, x, key_padding_mask=padding)
    with fused_lm.use_backend(backend):
        got = compiled(x, x, x, key_padding_mask=padding)
    torch.testing.assert_close(got, wanted)


class Coded(Tensor):
    """A weight that knows nothing but F.linear, as quantised ones do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            plain = [a.as_subclass(Tensor) if isinstance(a, Coded) else a for a in args]
            return func(*plain, **(kwargs or {}))
        if func.__name__ in ("__get__", "dim", "requires_grad"):
            return super().__torch_function__(func, types, args, kwargs or {})
        raise NotImplementedError(func)


def test_weights_of_another_class_are_used_by_their_module() -> None:
    layer = _layer()
    wanted = layer(x := torch.randn(N, T, C))
    weight = layer.linear1.weight.detach().as_subclass(Coded)
    del layer.linear1.weight
    layer.linear1.weight = weight
    fused_lm.fuse(layer)
    with fused_lm.use_backend("reference"):
        torch.testing.assert_close(layer(x), wanted)


def test_unfuse_takes_back_our_own_classes_only() -> None:
    class Doubled(LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = nn.Sequential(Doubled(C), nn.LayerNorm(C), nn.LayerNorm(C))
    fused_lm.fuse(model)
    parametrize.register_parametrization(model[1], "weight", Twice())
    stock_of_ours = model[2].forward
    model[2].forward = lambda *args: stock_of_ours(*args)  # type: ignore[method-assign]
    x = torch.randn(N, C)
    wanted = model(x)
    assert fused_lm.unfuse(model) == 0
    torch.testing.assert_close(model(x), wanted)


def test_a_wider_call_widens() -> None:
    layer = _layer()
    fused_lm.fuse(layer, ffn=False)
    with fused_lm.fused(layer) as report:
        assert report.changed == 1 and layer.fuse_ffn
    assert layer.fuse_ffn is False
    assert fused_lm.fuse(layer).changed == 1 and layer.fuse_ffn


def test_wrapped_models_can_be_taken_back() -> None:
    model = nn.Sequential(LayerNorm(C))
    assert fused_lm.unfuse(nn.DataParallel(model)) == 1 and type(model[0]) is nn.LayerNorm


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_output_projection_is_read_and_not_called(backend: str) -> None:
    """As torch does it: a hook on it is not called, a replaced one gives its weight."""
    ours = MultiheadAttention(C, H, batch_first=True)
    stock = nn.MultiheadAttention(C, H, batch_first=True)
    stock.load_state_dict(ours.state_dict())
    called: list[int] = []
    x = torch.randn(N, T, C)
    with fused_lm.use_backend(backend):
        for module in (stock, ours):
            module.out_proj.register_forward_hook(lambda *_: called.append(1))
            torch.testing.assert_close(module(x, x, x)[0], stock(x, x, x)[0])
    assert not called


def test_blocks_that_were_replaced_on_the_instance_keep_their_layer() -> None:
    layer = _layer()
    layer._ff_block = lambda x: 0 * x
    report = fused_lm.fuse(layer)
    assert type(layer) is nn.TransformerEncoderLayer
    assert "_ff_block was replaced" in {row.path: row.reason for row in report.rows}[""]


NATIVE = {
    "attention": "_native_multi_head_attention", "layer": "_transformer_encoder_layer_fwd",
    "encoder": "_nested_tensor_from_mask",
}  # fmt: skip
SETTINGS: list[tuple[dict[str, Any], bool]] = [
    ({}, True), ({"train": True}, False), ({"grad": True}, False), ({"batch_first": False}, False),
    ({"heads": 1}, False), ({"bias": False}, False), ({"fast": False}, False),
    ({"autocast": True}, False), ({"frozen": True}, True), ({"act": "silu"}, True),
    ({"hook": True}, True), ({"eps": 0.1}, True), ({"floats": True}, True),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings, sure", SETTINGS, ids=lambda value: str(value))
@pytest.mark.parametrize("kind", NATIVE)
def test_where_torch_leaves_its_modules(
    kind: str, settings: dict[str, Any], sure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What we think torch does natively is what it does: a spy on its operators."""
    from fused_lm.nn import stock_paths

    activation = torch.nn.functional.silu if "act" in settings else "relu"
    options = {"batch_first": settings.get("batch_first", True), "bias": settings.get("bias", True)}
    heads = settings.get("heads", H)
    layer = nn.TransformerEncoderLayer(C, heads, 2 * C, 0.0, activation, **options)
    encoder = nn.TransformerEncoder(layer, 1).train(settings.get("train", False))
    layer = encoder.layers[0]
    if "eps" in settings:
        layer.norm1.eps = 0.1
    if "hook" in settings:
        layer.linear1.register_forward_hook(lambda *_: None)
    if "frozen" in settings:
        encoder.requires_grad_(False)
    x, padding = torch.randn(T, T, C), (torch.arange(T) > 2).expand(T, T)
    if "floats" in settings:
        padding = torch.zeros(T, T).masked_fill(padding, -math.inf)
    called: list[str] = []
    native = getattr(torch, NATIVE[kind])
    spy = lambda *a, **k: (called.append(kind), native(*a, **k))[1]  # noqa: E731
    monkeypatch.setattr(torch, NATIVE[kind], spy)
    torch.backends.mha.set_fastpath_enabled(settings.get("fast", True))
    if "autocast" in settings:  # that of CUDA, which torch asks about
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: True)
    try:
        with torch.set_grad_enabled("grad" in settings or "frozen" in settings):
            if kind == "attention":
                call = stock_paths.StockCall(x, x, x, padding, True, None, True, False)
                thought = stock_paths.attention_is_native(layer.self_attn, call)
                layer.self_attn(x, x, x, key_padding_mask=padding)
            elif kind == "layer":
                thought = stock_paths.layer_is_native(layer, x)
                layer(x, src_key_padding_mask=padding)
            else:
                thought = stock_paths.encoder_drops_padding(encoder, x, None, padding)
                encoder(x, src_key_padding_mask=padding)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert thought == bool(called)
    assert sure or not called
    assert called or settings


def test_taken_names_what_ran() -> None:
    """The layers of this file run on what is forced: else its comparisons would prove little."""
    layer = _layer()
    fused_lm.fuse(layer)
    assert type(layer) is TransformerEncoderLayer
    with fused_lm.use_backend("reference"), taken.choices() as made:
        layer(torch.randn(N, T, C))
    assert {op for op, _ in made} == {"attention", "layer_norm", "ffn"}
