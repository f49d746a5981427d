"""``fuse``, ``unfuse``, ``fused``: what changes, what stays, what the changed modules compute."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fused_lm
from fused_lm.nn import LayerNorm, MultiheadAttention, TransformerEncoder, TransformerEncoderLayer
from tests import taken
from tests.gpu import HAS_GPU, INTERPRETER, TRITON_LATER, needs_interpreter
from tests.modules import Change, check_against_stock

C, H, N, T = 16, 2, 3, 6
BACKENDS = ("auto", "reference", *INTERPRETER)
MOST = ("auto", "reference", *(() if HAS_GPU else TRITON_LATER))
PADDING = torch.arange(T) >= torch.tensor([[T], [4], [2]])
CAUSAL = torch.ones(T, T).triu(1).bool()


def _layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        C, H, 2 * C, **{"batch_first": True, "dropout": 0.0, **options}
    )


def _encoder(layers: int = 2, **options: Any) -> nn.TransformerEncoder:
    encoder = nn.TransformerEncoder(_layer(**options), layers, norm=nn.LayerNorm(C))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder


def test_only_classes_change() -> None:
    model = _encoder()
    hooked = []
    model.layers[0].self_attn.register_forward_hook(lambda *_: hooked.append(1))
    model.tied = model.layers[0].linear1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: id(p) for name, p in model.named_parameters()}
    keys, state = list(model.state_dict()), copy.deepcopy(model.state_dict())
    attributes = {path: set(m.__dict__) for path, m in model.named_modules()}
    report = fused_lm.fuse(model)
    assert report.changed == 1 + 2 * (1 + 1 + 2) + 1
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert list(model.state_dict()) == keys
    assert attributes == {path: set(m.__dict__) for path, m in model.named_modules()}
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert isinstance(model, nn.TransformerEncoder) and type(model).__name__ == "TransformerEncoder"
    with fused_lm.use_backend("reference"):
        model(torch.randn(N, T, C)).square().sum().backward()
    optimizer.step()
    assert hooked and model.tied is model.layers[0].linear1
    assert not torch.equal(model.layers[0].linear1.weight, state["layers.0.linear1.weight"])


def test_there_and_back() -> None:
    model = nn.Transformer(C, H, 1, 1, 2 * C)
    classes = [type(m) for m in model.modules()]
    first, second = fused_lm.fuse(model), fused_lm.fuse(model)
    ours = [type(m) for m in model.modules()]
    assert first.changed > 0 and second.changed == 0 and len(first.rows) == len(second.rows)
    assert ours != classes and all(issubclass(o, s) for o, s in zip(ours, classes, strict=True))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in twin.modules()] == ours
    assert fused_lm.unfuse(model) == first.changed and fused_lm.unfuse(model) == 0
    assert [type(m) for m in model.modules()] == classes


def test_the_context_leaves_what_was_ours() -> None:
    model = nn.Sequential(LayerNorm(C), nn.LayerNorm(C), _layer())
    with pytest.raises(KeyError), fused_lm.fused(model, ffn=False) as report:
        assert report.changed == 1 + 4 and type(model[2]) is TransformerEncoderLayer
        assert model[2].fuse_ffn is False
        raise KeyError
    assert [type(m) for m in model] == [LayerNorm, nn.LayerNorm, nn.TransformerEncoderLayer]
    assert "fuse_ffn" not in model[2].__dict__


@pytest.mark.parametrize("switch", ["attention", "norm", "ffn"])
def test_the_switches(switch: str) -> None:
    """One alone: what is not asked for stays, and is not computed by us either."""
    model = _layer()
    fused_lm.fuse(model, **{name: name == switch for name in ("attention", "norm", "ffn")})
    assert type(model) is TransformerEncoderLayer
    assert (type(model.self_attn) is MultiheadAttention) == (switch == "attention")
    assert (type(model.norm1) is LayerNorm) == (switch == "norm")
    with taken.choices() as made, fused_lm.use_backend("reference"):
        model(torch.randn(N, T, C))
    expected = {"attention": {"attention"}, "norm": {"layer_norm"}, "ffn": {"ffn"}}
    assert {op for op, _ in made} == expected[switch]


@needs_interpreter
def test_the_report() -> None:
    class Own(nn.LayerNorm):
        pass

    model = nn.ModuleDict(
        {
            "layer": _layer(),
            "own": Own(C),
            "weighted": parametrizations.weight_norm(nn.LayerNorm(C)),
            "patched": nn.LayerNorm(C),
            "decoder": nn.TransformerDecoder(nn.TransformerDecoderLayer(C, H), 1),
            "linear": nn.Linear(C, C),
        }
    )
    model["patched"].forward = lambda x: x  # type: ignore[method-assign]
    report = fused_lm.fuse(model)
    rows = {row.path: row for row in report.rows}
    assert rows["layer.norm1"][1:] == ("LayerNorm", "fused_lm LayerNorm", "pytorch", "")
    assert "subclass of LayerNorm" in rows["own"].reason
    assert "parametrized" in rows["weighted"].reason
    assert "replaced on the instance" in rows["patched"].reason
    assert "layers" in rows["decoder"].reason and "linear" not in rows
    text = str(report)
    assert "left alone: its forward was replaced" in text
    assert f"{report.changed} of {len(rows)} modules changed, 4 left alone" in text
    assert len({line.index("runs on") for line in text.splitlines()[:1]}) == 1
    assert "nothing in this model" in str(fused_lm.fuse(nn.Linear(2, 2)))
    with fused_lm.use_backend("triton"):
        rows = {row.path: row for row in fused_lm.fuse(model).rows}
    assert rows["layer.norm1"].backend == rows["layer"].backend == "triton"
    with fused_lm.use_backend("triton"):
        report = fused_lm.fuse(nn.MultiheadAttention(1040, 1))
    assert report.rows[0].backend.startswith("nothing: backend 'triton' can't run")


def test_too_late_is_said() -> None:
    model = _layer()
    wrapped = nn.DataParallel(model)
    compiled = torch.compile(_layer())
    in_place = _layer()
    in_place.compile()
    for late, word in (
        (wrapped, "DataParallel"),
        (nn.Sequential(compiled), "torch.compile"),
        (in_place, "torch.compile"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(f"fuse the model before {word}")):
            fused_lm.fuse(late)
    assert type(model) is nn.TransformerEncoderLayer
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, got list"):
        fused_lm.fuse([model])  # type: ignore[arg-type]


def _results(model: nn.Module, x: Tensor, **masks: Any) -> list[Tensor]:
    leaf = x.detach().clone().requires_grad_()
    out = model(leaf, **masks)
    slope = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * slope).sum(), [leaf, *model.parameters()])]


def _masked(model: nn.Module, ours: nn.Module, x: Tensor, backend: str, **masks: Any) -> None:
    with fused_lm.use_backend(backend):
        got = _results(ours, x, **masks)

    def run(module: nn.Module, change: Change) -> list[Tensor]:
        floats = {
            k: change(m) if isinstance(m, Tensor) and m.is_floating_point() else m
            for k, m in masks.items()
        }
        return _results(module, change(x), **floats)

    check_against_stock(model, got, run, torch.finfo(x.dtype).eps)


FLOAT_CAUSAL = torch.zeros(T, T).masked_fill(CAUSAL, float("-inf"))
MASKS = [
    {}, {"mask": CAUSAL}, {"mask": FLOAT_CAUSAL}, {"mask": FLOAT_CAUSAL, "is_causal": True},
    {"src_key_padding_mask": PADDING}, {"mask": CAUSAL, "src_key_padding_mask": PADDING},
]  # fmt: skip


@pytest.mark.parametrize("backend", MOST)
@pytest.mark.parametrize("masks", MASKS, ids=lambda masks: " ".join(masks) or "none")
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_an_encoder_equals_stock(masks: Any, norm_first: bool, backend: str) -> None:
    activation: Any = nn.GELU("tanh") if norm_first else torch.relu
    model = _encoder(norm_first=norm_first, activation=activation)
    ours = copy.deepcopy(model)
    fused_lm.fuse(ours)
    _masked(model, ours, torch.randn(N, T, C), backend, **masks)


@pytest.mark.parametrize("backend", MOST)
@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_a_decoder_equals_stock(norm_first: bool, backend: str) -> None:
    model: Any = nn.TransformerDecoderLayer(
        C, H, 2 * C, 0.0, "gelu", norm_first=norm_first, batch_first=True
    )
    ours = copy.deepcopy(model)
    fused_lm.fuse(ours)
    x, memory = torch.randn(N, T, C), torch.randn(N, 4, C)
    for masks in (
        {},
        {"tgt_mask": CAUSAL, "tgt_is_causal": True, "memory_key_padding_mask": PADDING[:, :4]},
        {"tgt_key_padding_mask": PADDING, "memory_mask": torch.randn(T, 4)},
    ):
        _masked(model, ours, x, backend, memory=memory, **masks)


def test_a_mask_found_to_be_causal_is_causal_in_the_kernel() -> None:
    """Beside padding too. Another mask stays boolean there: two float masks could only be added."""
    ours = _encoder(1)
    fused_lm.fuse(ours)
    seen: list[Any] = []

    def choose(op: str, call: Any) -> str:
        seen.append((op, call))
        return "reference"

    with pytest.MonkeyPatch.context() as patch, fused_lm.use_backend("reference"):
        patch.setattr("fused_lm.dispatch.choose", choose)
        for mask in (CAUSAL, FLOAT_CAUSAL):
            ours(torch.randn(N, T, C), mask=mask)
        for mask in (CAUSAL, ~CAUSAL.t()):
            ours(torch.randn(N, T, C), mask=mask, src_key_padding_mask=PADDING)
    calls = [call for op, call in seen if op == "attention"]
    assert [(call.upper, call.mask, call.bias) for call in calls[:3]] == [(0, None, None)] * 3
    assert calls[2].key_mask is not None and calls[3].key_mask is not None
    assert calls[3].upper is None and calls[3].mask is not None and calls[3].bias is None


@pytest.mark.parametrize("backend", MOST)
@pytest.mark.parametrize(
    "checks, aligned",
    # Without a check stock takes the mask at its word: it must be aligned.
    [(True, True), (True, False), (False, True)],
    ids=["checked", "on the left", "unchecked"],
)
def test_padded_tokens_mean_in_inference_what_they_meant(
    checks: bool, aligned: bool, backend: str
) -> None:
    """Stock drops padding on the right, which makes zeros of it before the last norm."""
    model = _encoder().eval()
    model.mask_check = checks
    padding = PADDING if aligned else PADDING.flip(1)
    ours = copy.deepcopy(model)
    fused_lm.fuse(ours)
    x = torch.randn(N, T, C)
    with torch.no_grad():
        wanted = model(x, src_key_padding_mask=padding)
        with fused_lm.use_backend(backend), taken.choices() as made:
            got = ours(x, src_key_padding_mask=padding)
            floats = torch.zeros(N, T).masked_fill(padding, float("-inf"))
            torch.testing.assert_close(ours(x, src_key_padding_mask=floats), got)
    assert torch.equal(got, wanted) if backend == "auto" else bool(made)
    torch.testing.assert_close(got, wanted)
    zeroed = torch.isclose(wanted[padding], model.norm.bias.expand(C)).all()
    assert bool(zeroed) == aligned


@pytest.mark.parametrize("backend", MOST)
@pytest.mark.parametrize("padded", [False, True])
def test_inference_does_not_pass_our_modules_by(padded: bool, backend: str) -> None:
    """Stock runs one native operator a layer, which is NaN in rows without a key."""
    model = _layer(activation="gelu").eval()
    ours = copy.deepcopy(model)
    fused_lm.fuse(ours)
    x = torch.randn(N, T, C)
    padding = PADDING.clone()
    padding[2] = padded
    with torch.no_grad(), fused_lm.use_backend(backend), taken.choices() as made:
        got = ours(x, src_key_padding_mask=padding)
        wanted = model(x, src_key_padding_mask=padding)
    if backend != "auto":
        assert {op for op, _ in made} == {"attention", "layer_norm", "ffn"}
    rows = torch.isfinite(wanted).all(-1)
    assert bool(rows[:2].all()) and bool(rows.all()) != padded
    torch.testing.assert_close(got[rows], wanted[rows])
    assert backend != "auto" or torch.equal(got[rows], wanted[rows])
    attended = model.self_attn.out_proj.bias
    hidden = model.norm1(x + attended)
    plain = model.norm2(hidden + model.linear2(model.activation(model.linear1(hidden))))
    if padded:
        torch.testing.assert_close(got[2], plain[2])


def test_parts_that_someone_replaced_or_listens_to_are_called() -> None:
    x = torch.randn(N, T, C)
    for name in ("linear1", "linear2", "dropout", "norm1", "dropout1", "norm2", "dropout2"):
        model = _layer()
        ours = copy.deepcopy(model)
        fused_lm.fuse(ours)
        calls: list[int] = []
        ours.get_submodule(name).register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with fused_lm.use_backend("reference"):
            torch.testing.assert_close(ours(x), model(x))
        assert calls == [1], name
    fused_lm.fuse(model)
    model.linear2 = nn.Sequential(nn.Linear(2 * C, C), nn.Tanh())
    with fused_lm.use_backend("reference"):
        assert model(x).shape == x.shape
    model.activation = torch.tanh
    with fused_lm.use_backend("reference"), taken.choices() as made:
        model(x)
    assert {op for op, _ in made} == {"attention", "layer_norm"}


@pytest.mark.parametrize("backend", ["reference", *INTERPRETER])
def test_dropout_stands_where_it_stood(backend: str) -> None:
    """With everything dropped each branch is what comes after its dropout."""
    ours = _layer(dropout=1.0)
    fused_lm.fuse(ours)
    x = torch.randn(N, T, C)
    with fused_lm.use_backend(backend):
        torch.testing.assert_close(ours(x), ours.norm2(ours.norm1(x)))
        ours.dropout1.p = ours.dropout2.p = ours.self_attn.dropout = 0.0
        hidden = ours.norm1(x + ours.self_attn(x, x, x)[0])
        torch.testing.assert_close(ours(x), ours.norm2(hidden + ours.linear2.bias))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_fused_models_compile_whole(backend: str) -> None:
    model = _encoder(1)
    fused_lm.fuse(model)
    x = torch.randn(N, T, C)
    torch._dynamo.reset()
    with fused_lm.use_backend(backend):
        wanted = model(x, mask=CAUSAL, is_causal=True)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = compiled(x, mask=CAUSAL, is_causal=True)
    torch.testing.assert_close(got, wanted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_takes_the_stock_classes_and_leaves_ours() -> None:
    ours: Any = _encoder(1)
    fused_lm.fuse(ours)
    x = torch.randn(N, T, C)
    scripted = torch.jit.script(ours)
    torch.testing.assert_close(scripted(x), ours(x))
    assert type(ours) is TransformerEncoder and type(ours.layers[0]) is TransformerEncoderLayer
    assert type(ours.layers[0].self_attn) is MultiheadAttention
    with torch.no_grad():
        ours.layers[0].linear1.weight.zero_()
    torch.testing.assert_close(scripted(x), ours(x))


def test_ours_can_be_built_as_torchs_are() -> None:
    """Same seed, same weights, our modules inside, the same state dict both ways."""
    for own in (TransformerEncoderLayer, fused_lm.nn.TransformerDecoderLayer):
        torch.manual_seed(3)
        stock = own.stock(C, H, 2 * C, activation="gelu", norm_first=True)
        torch.manual_seed(3)
        ours = own(C, H, 2 * C, activation="gelu", norm_first=True)
        assert type(ours.self_attn) is MultiheadAttention and type(ours.norm2) is LayerNorm
        for (a, p), (b, q) in zip(
            stock.state_dict().items(), ours.state_dict().items(), strict=True
        ):
            assert a == b and torch.equal(p, q)
    encoder = TransformerEncoder(TransformerEncoderLayer(C, H, batch_first=True), 2)
    assert type(encoder.layers[1]) is TransformerEncoderLayer
    assert encoder(torch.randn(N, T, C)).shape == (N, T, C)
