"""nn.MultiheadAttention against torch's: what random cases don't reach."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_lm
from fused_lm.nn.stock_paths import StockCall
from tests.gpu import TRITON_LATER

E, H, N, T, S = 24, 4, 3, 7, 9
BACKENDS = ("auto", "reference", "triton")
MOST = ("auto", "reference", *TRITON_LATER)
CPU = torch.device("cpu")


def _pair(
    device: torch.device, **options: Any
) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    """torch's module and ours from the same seed, which must give the same weights."""
    modules = []
    for cls in (nn.MultiheadAttention, fused_lm.nn.MultiheadAttention):
        torch.manual_seed(7)
        modules.append(cls(E, H, **options).to(device))
    stock, ours = modules
    assert list(stock.state_dict()) == list(ours.state_dict())
    for a, b in zip(stock.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)
    return stock, ours


def _masks(kind: str, device: torch.device) -> Tensor | None:
    """A key is never hidden from every query here; rows without a key have a test of their own."""
    if kind == "none":
        return None
    hidden = torch.rand(T, S, device=device) < 0.3
    hidden[:, 0] = False
    if kind == "3d":
        hidden = hidden.repeat(N * H, 1, 1)
        hidden[1, :, 3] = True
    if kind == "float":
        return torch.randn(T, S, device=device)
    if kind == "float -inf":
        return torch.zeros(T, S, device=device).masked_fill(hidden, float("-inf"))
    return hidden


def _padding(kind: str, S: int, device: torch.device) -> Tensor | None:
    if kind == "none":
        return None
    padding = torch.arange(S, device=device) >= torch.tensor([[S], [S - 2], [4]], device=device)
    return padding.float().masked_fill(padding, -1e4) if kind == "float" else padding


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("average", [True, False, None], ids=["averaged", "per head", "no weights"])
@pytest.mark.parametrize(
    "mask, padding",
    [
        ("none", "none"), ("2d", "none"), ("3d", "bool"), ("float", "none"), ("none", "bool"),
        ("float -inf", "bool"), ("float", "float"), ("2d", "float"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_masks_and_weights(
    mask: str, padding: str, average: bool | None, backend: str, device: torch.device
) -> None:
    stock, ours = _pair(device, batch_first=True)
    query, keys = (torch.randn(N, rows, E, device=device) for rows in (T, S))
    arguments = {
        "attn_mask": _masks(mask, device),
        "key_padding_mask": _padding(padding, S, device),
        "need_weights": average is not None,
        "average_attn_weights": bool(average),
    }
    _compare(stock, ours, (query, keys, keys), arguments, backend)


@pytest.mark.parametrize("backend", MOST)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"bias": False}, {"kdim": 10, "vdim": 6}, {"add_bias_kv": True},
        {"add_zero_attn": True}, {"kdim": 10, "vdim": 6, "bias": False},
    ],
    ids=str,
)  # fmt: skip
def test_constructor_options(
    options: dict[str, Any], batch_first: bool, backend: str, device: torch.device
) -> None:
    stock, ours = _pair(device, batch_first=batch_first, **options)
    shapes = [(N, T, E), (N, S, options.get("kdim", E)), (N, S, options.get("vdim", E))]
    if not batch_first:
        shapes = [(rows, batch, width) for batch, rows, width in shapes]
    inputs = tuple(torch.randn(shape, device=device) for shape in shapes)
    _compare(stock, ours, inputs, {}, backend)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("backend", MOST)
def test_self_attention_unbatched_and_causal(backend: str, device: torch.device) -> None:
    stock, ours = _pair(device)
    x = torch.randn(T, E, device=device)
    padding = torch.arange(T, device=device) > 4
    _compare(stock, ours, (x, x, x), {"key_padding_mask": padding}, backend)
    mask = nn.Transformer.generate_square_subsequent_mask(T, device=device)
    for need_weights, padded in itertools.product([False, True], [False, True]):
        arguments = {
            "attn_mask": mask, "is_causal": True, "need_weights": need_weights,
            "key_padding_mask": padding if padded else None,
        }  # fmt: skip
        _compare(stock, ours, (x, x, x), arguments, backend)


def _compare(
    stock: nn.Module, ours: nn.Module, inputs: tuple[Tensor, ...], arguments: Any, backend: str
) -> None:
    """Outputs, weights, gradients of inputs and parameters; to the last bit where auto is torch."""
    results, device = [], inputs[0].device
    for module, forced in ((stock, "auto"), (ours, backend)):
        distinct = {id(t): t.detach().clone().requires_grad_() for t in inputs}
        leaves = [distinct[id(t)] for t in inputs]
        with fused_lm.use_backend(forced):
            out, weights = module(*leaves, **arguments)
        outputs = [out] if weights is None else [out, weights]
        total = sum((t * torch.linspace(-1, 1, t.shape[-1], device=device)).sum() for t in outputs)
        points = [*distinct.values(), *module.parameters()]
        results.append([*outputs, *torch.autograd.grad(total, points)])
    bits = _auto_is_torch(backend, inputs[0])
    tolerance = {"rtol": 0.0, "atol": 0.0} if bits else {"rtol": 1e-4, "atol": 1e-5}
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, **tolerance)


def _auto_is_torch(backend: str, x: Tensor) -> bool:
    """On a GPU a record may let auto take a kernel."""
    return backend == "auto" and not x.is_cuda


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", MOST)
def test_rows_without_a_key_are_not_nan(backend: str, training: bool, device: torch.device) -> None:
    stock, ours = _pair(device, batch_first=True)
    stock.train(training), ours.train(training)
    x = torch.randn(N, T, E, device=device)
    padding = torch.zeros(N, T, dtype=torch.bool, device=device)
    padding[1] = True
    with fused_lm.use_backend(backend), torch.set_grad_enabled(training):
        out, weights = ours(x, x, x, key_padding_mask=padding)
        if training:
            grads = torch.autograd.grad(out.square().sum() + weights.sum(), [*ours.parameters()])
            assert all(bool(torch.isfinite(g).all()) for g in grads)
        assert torch.all(weights[1] == 0)
        torch.testing.assert_close(out[1], ours.out_proj.bias.expand(T, E))
        assert torch.isfinite(out).all()
        wanted, _ = stock(x, x, x, key_padding_mask=padding)
        strict = fused_lm.nn.MultiheadAttention(E, H, batch_first=True, strict_nan=True)
        strict.to(device).train(training).load_state_dict(stock.state_dict())
        got, _ = strict(x, x, x, key_padding_mask=padding)
    assert torch.equal(torch.isnan(got), torch.isnan(wanted)) and torch.isnan(wanted).any()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_dropout_of_weights_and_output_is_one(backend: str, device: torch.device) -> None:
    """Returned weights are those that were used: zero where dropped, and out = weights @ v."""
    _, ours = _pair(device, batch_first=True, dropout=0.5, bias=False)
    x = torch.randn(N, T, E, device=device)
    with fused_lm.use_backend(backend):
        out, weights = ours(x, x, x, average_attn_weights=False)
    assert 0.2 < (weights == 0).float().mean() < 0.8
    v = (x @ ours.in_proj_weight[2 * E :].t()).unflatten(-1, (H, E // H)).transpose(1, 2)
    expected = ours.out_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected)
    ours.eval()
    with fused_lm.use_backend(backend):
        assert not (ours(x, x, x)[1] == 0).any()


def test_pytorch_raises_its_own_errors() -> None:
    _, ours = _pair(CPU)
    x = torch.randn(T, N, E)
    with fused_lm.use_backend("reference"):
        with pytest.raises(RuntimeError, match="The shape of the 2D attn_mask is"):
            ours(x, x, x, attn_mask=torch.zeros(3, 3))
        with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
            ours(x, x, x, is_causal=True)
        with pytest.raises(AssertionError, match="only bool and floating types"):
            ours(x, x, x, attn_mask=torch.zeros(T, T, dtype=torch.int64))


@pytest.mark.parametrize("backend", MOST)
def test_module_survives_what_modules_go_through(backend: str, device: torch.device) -> None:
    stock, ours = _pair(device, batch_first=True)
    x = torch.randn(N, T, E, device=device)
    with fused_lm.use_backend(backend):
        expected = ours(x, x, x)[0]
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert type(twin) is fused_lm.nn.MultiheadAttention
            torch.testing.assert_close(twin(x, x, x)[0], expected)
        ours.load_state_dict(stock.state_dict())
        stock.load_state_dict(ours.state_dict())
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, x, x, need_weights=False)[0], expected)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert ours(x, x, x)[0].dtype == stock(x, x, x)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("backend", MOST)
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_output_is_contiguous(batch_first: bool, backend: str, device: torch.device) -> None:
    """Users call ``view`` on it; torch's own is contiguous unless batch_first."""
    stock, ours = _pair(device, batch_first=batch_first)
    x = torch.randn(N, T, E, device=device)
    with fused_lm.use_backend(backend):
        out = ours(x, x, x, need_weights=False)[0]
    assert out.stride() == stock(x, x, x, need_weights=False)[0].stride() or out.is_contiguous()
    assert backend == "auto" or out.is_contiguous()


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_no_tensor_of_all_heads_is_built() -> None:
    """Masks that torch merges into [N*H, T, S] go to the kernels as they are."""
    _, ours = _pair(CPU, batch_first=True)
    x = torch.randn(N, T, E)
    causal = torch.ones(T, T).triu(1).bool()
    floats = torch.zeros(T, T).masked_fill(causal, float("-inf"))
    kinds = (_padding("bool", T, CPU), _padding("float", T, CPU))
    for attn, padding in itertools.product((causal, floats), kinds):
        assert padding is not None
        seen: list[Any] = []

        def choose(op: str, call: Any, seen: list[Any] = seen) -> str:
            seen.append(call)
            return "reference"

        with pytest.MonkeyPatch.context() as patch, fused_lm.use_backend("reference"):
            patch.setattr("fused_lm.ops.attention.dispatch.choose", choose)
            ours(x, x, x, attn_mask=attn, key_padding_mask=padding, need_weights=False)
        (call,) = seen
        floats_meet = attn.dtype == padding.dtype == torch.float32
        most = N * T * T if floats_meet else T * T
        for mask in (call.mask, call.bias):
            held = 0 if mask is None else mask.untyped_storage().nbytes() // mask.element_size()
            assert held <= most


def test_torchscript_compiles_the_stock_class() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = fused_lm.nn.MultiheadAttention(E, H)
            self.norm = fused_lm.nn.LayerNorm(E)
            self.rms = fused_lm.nn.RMSNorm(E)

        def forward(self, x: Tensor) -> Tensor:
            return self.rms(self.norm(self.attention(x, x, x)[0]))

    holder = Holder()
    x = torch.randn(T, N, E)
    wanted = holder(x)
    torch.testing.assert_close(torch.jit.script(holder)(x), wanted)
    alone = fused_lm.nn.MultiheadAttention(E, H)
    torch.testing.assert_close(torch.jit.script(alone)(x, x, x)[1], alone(x, x, x)[1])
    assert type(alone) is fused_lm.nn.MultiheadAttention


@pytest.mark.parametrize("backend", MOST)
@pytest.mark.parametrize("need_weights", [True, False])
def test_masked_calls_compile_whole(need_weights: bool, backend: str, device: torch.device) -> None:
    """Where torch's own forward could be NaN too: no look at the masks there, no graph break."""
    _, ours = _pair(device, batch_first=True)
    x = torch.randn(N, T, E, device=device)
    padding = torch.zeros(N, T, dtype=torch.bool, device=device)
    padding[1] = True
    for training in (True, False):
        torch._dynamo.reset()
        ours.train(training)
        call = {"key_padding_mask": padding, "need_weights": need_weights}
        with fused_lm.use_backend(backend), torch.set_grad_enabled(training):
            compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
            got, wanted = compiled(x, x, x, **call), ours(x, x, x, **call)
        torch.testing.assert_close(got[0], wanted[0])
        torch.testing.assert_close(got[1], wanted[1])
        assert torch.isfinite(got[0]).all()


def test_a_true_hint_beside_padding_makes_the_kernel_causal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mask is looked at once, and again when it has changed."""
    _, ours = _pair(CPU, batch_first=True)
    looks, seen = [], []
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: (looks.append(1), equal(a, b))[1])

    def choose(op: str, call: Any) -> str:
        seen.append(call)
        return "reference"

    monkeypatch.setattr("fused_lm.dispatch.choose", choose)
    x, padding = torch.randn(N, T, E), _padding("bool", T, CPU)
    for mask in (torch.ones(T, T).triu(1).bool(), torch.full((T, T), -torch.inf).triu(1)):
        looks.clear()
        for _ in range(2):
            for need_weights in (False, True):
                seen.clear()
                with fused_lm.use_backend("reference"):
                    ours(x, x, x, padding, need_weights, mask, is_causal=True)
                for call in seen:
                    assert (call.upper, call.mask, call.bias) == (0, None, None)
                    assert call.key_mask is not None
        assert len(looks) == 1
        mask[0, 1] = 0
        seen.clear()
        with fused_lm.use_backend("reference"):
            ours(x, x, x, padding, False, mask, is_causal=True)
        assert seen[0].upper is None and len(looks) == 2


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
def test_nested_tensors_go_to_torch(backend: str) -> None:
    """Which takes them in its fast path, and raises its own error elsewhere."""
    stock, ours = _pair(CPU, batch_first=True)
    rows = [torch.randn(length, E) for length in (3, 5)]
    for layout in (torch.strided, torch.jagged):
        x = torch.nested.nested_tensor(rows, layout=layout)
        outcomes = []
        for module in (stock, ours):
            for training in (False, True):
                with torch.no_grad(), fused_lm.use_backend(backend):
                    try:
                        out = module.train(training)(x, x, x, need_weights=False)[0]
                        outcomes.append([part.tolist() for part in out.unbind()])
                    except Exception as error:
                        outcomes.append([type(error), str(error)])
        assert outcomes[:2] == outcomes[2:]
        assert (layout == torch.strided) == isinstance(outcomes[0][0], list)


def test_auto_fuses_only_where_every_kernel_of_the_call_has_a_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What dispatch is asked about is the call that would run: gradients, masks, dtype, weights."""
    asked = []

    def choose(op: str, call: Any) -> str:
        asked.append((op, call))
        return "reference" if op == "attention_weights" else "triton"

    monkeypatch.setattr("fused_lm.nn.attention.dispatch.choose", choose)
    _, ours = _pair(CPU, batch_first=True)
    x = torch.randn(N, T, E)
    masks = {"key_padding_mask": _padding("bool", T, CPU), "attn_mask": None}
    rest = {"average_attn_weights": True, "is_causal": False}
    call = StockCall(x, x, x, need_weights=False, **masks, **rest)
    assert ours._fusable(call) == (N, T, T)
    assert ours._fusable(call._replace(need_weights=True)) is None
    op, seen = asked[0]
    assert seen.q.untyped_storage().nbytes() == seen.q.element_size()
    assert op == "attention" and seen.q.requires_grad and seen.key_mask is not None
    assert asked[-1][0] == "attention_weights"
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        ours._fusable(call)
    q = asked[-1][1].q
    assert q.dtype == torch.bfloat16 and not q.requires_grad


def test_self_attention_projects_once_in_every_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    linear = torch.nn.functional.linear

    def counted(*args: Any) -> Tensor:
        calls.append(args[1].shape[0])
        return linear(*args)

    monkeypatch.setattr("fused_lm.nn.attention.F.linear", counted)
    for batch_first, shape in ((True, (N, T, E)), (False, (T, N, E)), (False, (T, E))):
        _, ours = _pair(CPU, batch_first=batch_first)
        x = torch.randn(shape)
        calls.clear()
        with fused_lm.use_backend("reference"):
            ours(x, x, x, need_weights=False)
        assert calls.count(3 * E) == 1 and E not in calls[:1]
