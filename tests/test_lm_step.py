"""One step and one evaluation: accumulation, clipping, precision, compiling, metrics."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fused_lm.lm.data import BatchSampler, split_text
from fused_lm.lm.gpt import GPT, GPTConfig
from fused_lm.lm.metrics import Score, evaluate, perplexity, score_logits
from fused_lm.lm.precision import Precision, pick_precision
from fused_lm.lm.settings import TrainError
from fused_lm.lm.step import LossModule, make_optimizer, training_step
from fused_lm.lm.text import Text

CPU = torch.device("cpu")
FP32 = Precision("fp32", "cpu")
SHAPE = GPTConfig(vocab_size=50, context=12, num_layers=2, embed_dim=16, num_heads=2)
NO_CLIP = 1e9


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch(count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(50, (count, 13))
    return tokens[:, :-1], tokens[:, 1:]


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulated_gradients_equal_the_one_big_batch(accumulate: int) -> None:
    model, data = GPT(SHAPE).double(), batch()
    exact_loss = model.loss(*data)
    exact_loss.backward()
    exact = gradients(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss, norm = training_step(
        LossModule(model), optimizer, *data, NO_CLIP, FP32, accumulate=accumulate
    )
    rounding = 64 * torch.finfo(torch.float64).eps
    assert abs(loss.double() - exact_loss).item() <= 2 * torch.finfo(torch.float32).eps * 8
    got = gradients(model)
    assert got.keys() == exact.keys()
    for name, expected in exact.items():
        assert (got[name] - expected).abs().max() <= rounding * expected.abs().max(), name
    assert norm.item() == pytest.approx(
        math.sqrt(sum(float(g.square().sum()) for g in exact.values())), rel=1e-12
    )


def test_clipping_bounds_the_norm_and_reports_the_one_before() -> None:
    model, data = GPT(SHAPE), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    _, before = training_step(LossModule(model), optimizer, *data, 0.01, FP32)
    after = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients(model).values()]))
    assert before > 0.02
    assert after.item() == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_low_precision_step_is_near_the_exact_one(name: str) -> None:
    model, data = GPT(SHAPE), batch()
    low = copy.deepcopy(model)
    exact, _ = training_step(LossModule(model), make_optimizer(model, 1e-2, 0.1), *data, 1.0, FP32)
    precision = Precision(name, "cpu")
    scaler = precision.make_scaler()
    assert (scaler is not None) == (name == "fp16")
    optimizer = make_optimizer(low, 1e-2, 0.1)
    loss, norm = training_step(
        LossModule(low), optimizer, *data, 1.0, precision, accumulate=2, scaler=scaler
    )
    assert loss.dtype == torch.float32 and torch.isfinite(norm)
    eps = torch.finfo(torch.bfloat16 if name == "bf16" else torch.float16).eps
    assert loss != exact, "it did compute in 16 bits"
    assert abs(loss - exact) < 8 * eps * exact
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in low.parameters())


def test_overflowing_fp16_step_changes_no_weight_and_lowers_the_scale() -> None:
    model = GPT(SHAPE)
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, 1e-2, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    training_step(
        LossModule(model), optimizer, *batch(), 1.0, Precision("fp16", "cpu"), scaler=scaler
    )
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_precisions_are_picked_or_refused() -> None:
    assert pick_precision("auto", CPU).name == "fp32"
    assert pick_precision("bf16", CPU) == Precision("bf16", "cpu")
    with pytest.raises(TrainError, match="one of auto, fp32, bf16, fp16; got 'fp8'"):
        pick_precision("fp8", CPU)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_out_the_same_batch(processes: int) -> None:
    text = Text("noise", np.random.default_rng(0).integers(0, 256, 3000, dtype=np.uint8))
    windows, _ = split_text(text, 8)
    alone = BatchSampler(windows, 6, seed=5)
    shares = [BatchSampler(windows, 6, 5, rank, processes) for rank in range(processes)]
    for _ in range(3):
        expected = alone.next()
        got = [sampler.next() for sampler in shares]
        for part in (0, 1):
            assert torch.equal(torch.cat([share[part] for share in got]), expected[part])
        assert all(torch.equal(sampler.state(), alone.state()) for sampler in shares)


class Fixed(torch.nn.Module):
    """A model whose logits for any token are the logarithms of given probabilities."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*tokens.shape, -1)


def test_metrics_are_exact_where_the_answer_is_known() -> None:
    """Text of the tokens 0 and 1 by turns; a token of two bytes and one of six."""
    data = np.tile(np.array([0, 1], dtype=np.uint8), 2000)
    _, held_out = split_text(Text("turns", data), 8)
    root = LossModule(Fixed([0.5, 0.25, 0.25]))
    score = evaluate(root, held_out, 160, 3, FP32, np.array([2, 6, 9]))
    assert score is not None
    assert (score.tokens, score.bytes) == (160, 80 * 2 + 80 * 6)
    assert score.accuracy == 0.5, "token 0 is the likeliest, and half of the targets"
    assert score.loss == pytest.approx(1.5 * math.log(2), rel=1e-6)
    assert score.perplexity == pytest.approx(2**1.5, rel=1e-6)
    assert score.bits_per_byte == pytest.approx(1.5 / 4, rel=1e-6)
    assert perplexity(1e9) == math.inf


def test_evaluation_equals_the_loss_and_ends_when_asked() -> None:
    model = GPT(SHAPE)
    data = np.random.default_rng(0).integers(0, 50, 4000).astype(np.uint16)
    _, held_out = split_text(Text("noise", data), 12)
    ones = np.ones(50, dtype=np.int64)
    score = evaluate(LossModule(model), held_out, 10**9, 5, FP32, ones)
    tokens, targets = held_out.gather(held_out.evenly_spaced(10**9))
    with torch.no_grad():
        logits = model(tokens)
        assert isinstance(score, Score) and score.tokens == score.bytes == targets.numel()
        assert score.loss == pytest.approx(float(model.loss(tokens, targets)), rel=1e-6)
    assert score.correct == int((logits.argmax(-1) == targets).sum())
    nats, correct = score_logits(logits, targets)
    assert nats.shape == correct.shape == (len(tokens),)
    assert evaluate(LossModule(model), held_out, 99, 5, FP32, ones, lambda: True) is None
