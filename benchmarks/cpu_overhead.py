"""What fused_lm costs where no kernel of ours runs: on a CPU nobody may lose.

``python -m benchmarks.cpu_overhead [--pairs 60] [--only step|calls|import] [--json OUT]`` measures

- step: one training step of ``lm.GPT`` against the same model in stock modules, interleaved with
  a control (a second stock model against the first) that shows this machine's noise;
- calls: one eager call on tiny tensors against PyTorch's own, or of a forced operator against the
  backend function called directly, both with or both without autograd, in one thread's CPU time;
- import: ``import fused_lm`` after ``import torch`` in fresh processes, and what it must not load.

Exit code 1 if a median is over its limit. Before any step is timed, the two models must agree.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_lm
from fused_lm.lm import GPT, GPTConfig
from fused_lm.reference import attention as reference_attention
from fused_lm.reference import layernorm as reference_layernorm
from fused_lm.tolerance import check_close

STEP_LIMIT = 0.03
"""Largest slowdown of a training step, as a fraction."""
AUTO_LIMIT_US = 8.0
FORCED_LIMIT_US = 12.0
IMPORT_LIMIT_S = 0.2

BATCH = 4
CONFIG = GPTConfig(num_layers=6, embed_dim=384, num_heads=6, context=256)
CALLS_PER_ROUND, CALL_ROUNDS, CALL_BLOCKS = 25, 100, 7
IMPORT_RUNS = 9
RESAMPLES = 2000


@dataclass(frozen=True)
class Row:
    """One line of the table: a median, its 95 % interval, and the limit (None: for information)."""

    name: str
    unit: str
    median: float
    low: float
    high: float
    limit: float | None

    @property
    def verdict(self) -> str:
        if self.limit is None:
            return "-"
        return "ok" if self.median <= self.limit else "OVER"


class StockBlock(nn.Module):
    """``fused_lm.nn.GPTBlock`` (pre-norm, GELU) in stock modules, with the same parameter names."""

    def __init__(self, C: int, H: int, ffn_dim: int) -> None:
        super().__init__()
        self.H = H
        self.norm1 = nn.LayerNorm(C)
        self.qkv, self.out_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.norm2 = nn.LayerNorm(C)
        self.ffn = nn.ModuleDict({"up": nn.Linear(C, ffn_dim), "down": nn.Linear(ffn_dim, C)})

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.H, C // self.H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out_proj(out.transpose(1, 2).reshape(B, T, C))
        return x + self.ffn["down"](F.gelu(self.ffn["up"](self.norm2(x))))


class StockGPT(nn.Module):
    """``fused_lm.lm.GPT`` with learned positions and a tied head in stock modules."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.embed_dim
        self.tokens = nn.Embedding(config.vocab_size, C)
        self.positions = nn.Embedding(config.context, C)
        layers = range(config.num_layers)
        self.blocks = nn.ModuleList(StockBlock(C, config.num_heads, 4 * C) for _ in layers)
        self.norm = nn.LayerNorm(C)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """Median and the 95 % bootstrap interval of the median."""
    sample = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    medians = sample[picks].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return statistics.median(values), low, high


def measure_step(pairs: int) -> list[Row]:
    """Ratios of step times, ours / stock and control / stock, minus 1."""
    torch.manual_seed(0)
    ours, stock, control = GPT(CONFIG), StockGPT(CONFIG), StockGPT(CONFIG)
    stock.load_state_dict(ours.state_dict())
    control.load_state_dict(ours.state_dict())
    shape = (BATCH, CONFIG.context)
    tokens, targets = (torch.randint(CONFIG.vocab_size, shape) for _ in range(2))
    _check_agreement(ours, stock, tokens[:1], targets[:1])
    steps = [_step(model, tokens, targets) for model in (ours, stock, control)]
    for step in steps * 3:
        step()
    slower: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        seconds = [0.0, 0.0, 0.0]
        for turn in range(3):
            which = (pair + turn) % 3 if pair % 2 else (pair - turn) % 3
            begin = time.perf_counter()
            steps[which]()
            seconds[which] = time.perf_counter() - begin
        slower[0].append(seconds[0] / seconds[1] - 1)
        slower[1].append(seconds[2] / seconds[1] - 1)
        if pair % 10 == 9:
            print(f"{pair + 1} of {pairs} pairs of steps", file=sys.stderr, flush=True)
    return [
        Row("training step, fused_lm / stock - 1", "", *median_interval(slower[0]), STEP_LIMIT),
        Row("training step, control / stock - 1", "", *median_interval(slower[1]), None),
    ]


def _step(model: GPT | StockGPT, tokens: Tensor, targets: Tensor) -> Callable[[], None]:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        model.loss(tokens, targets).backward()
        optimiser.step()

    return step


def _check_agreement(ours: GPT, stock: StockGPT, tokens: Tensor, targets: Tensor) -> None:
    """Raises AssertionError unless both models compute one function: no speed from a red test."""
    wide = StockGPT(CONFIG).double()
    wide.load_state_dict(stock.state_dict())
    with torch.no_grad():
        check_close(ours(tokens), stock(tokens), wide(tokens), "logits")
    for model in (ours, stock, wide):
        model.loss(tokens, targets).backward()
    # The embedding's gradient has passed every layer, so one tensor judges the whole backward.
    gradients = [model.tokens.weight.grad for model in (ours, stock, wide)]
    check_close(*gradients, "gradient of the embedding")
    for model in (ours, stock):
        model.zero_grad(set_to_none=True)


def measure_calls() -> list[Row]:
    """Microseconds of one call over those of the peer, for each case of :func:`_cases`."""
    rows, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # so that the clock of this thread sees all the work
    for grad in (False, True):
        for name, backend, ours, peer, limit in _cases(grad):
            with fused_lm.use_backend(backend), torch.set_grad_enabled(grad):
                extra = _extra_us(ours, peer)
            label = f"{name}, {backend}, grad {'on' if grad else 'off'}"
            rows.append(Row(label, "us", *median_interval(extra), limit))
    torch.set_num_threads(threads)
    return rows


def _extra_us(ours: Callable[[], object], peer: Callable[[], object]) -> list[float]:
    """Differences of the fastest rounds, one per block.

    A shared machine only ever adds time, and in bursts: within a block the fastest of many
    interleaved rounds is the cost of the code.
    """
    extra = []
    for block_idx in range(CALL_BLOCKS + 1):
        fastest = {ours: math.inf, peer: math.inf}
        for round_idx in range(CALL_ROUNDS):
            for call in (ours, peer) if round_idx % 2 else (peer, ours):
                begin = time.thread_time()
                for _ in range(CALLS_PER_ROUND):
                    call()
                fastest[call] = min(fastest[call], time.thread_time() - begin)
        if block_idx:  # the first warms up
            extra.append((fastest[ours] - fastest[peer]) / CALLS_PER_ROUND * 1e6)
    return extra


Case = tuple[str, str, Callable[[], object], Callable[[], object], float]


def _cases(grad: bool) -> list[Case]:
    """(name, backend, ours, peer, limit) on tensors so small that only the call itself counts."""
    q, k, v = (torch.randn(1, 2, 8, 8, requires_grad=grad) for _ in range(3))
    x, residual = (torch.randn(4, 32, requires_grad=grad) for _ in range(2))
    weight, bias = (torch.randn(32, requires_grad=grad) for _ in range(2))
    shape, scale, f32 = (32,), 8**-0.5, torch.float32

    def direct_attention() -> object:
        masks = (None,) * 4
        return reference_attention.attention_forward(q, k, v, *masks, None, 0, scale, 0.0, 0.0)

    def direct_layer_norm() -> object:
        return reference_layernorm.layer_norm_forward(
            x, None, weight, bias, None, 1e-5, 0.0, f32, f32
        )

    def attention() -> object:
        return fused_lm.attention(q, k, v, causal="top_left")

    def layer_norm() -> object:
        return fused_lm.layer_norm(x, weight, bias)

    def add_norm() -> object:
        return fused_lm.layer_norm(x, weight, bias, residual=residual, return_residual=True)

    def stock_attention() -> object:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def stock_add_norm() -> object:
        stream = residual + x
        return F.layer_norm(stream, shape, weight, bias), stream

    def stock_layer_norm() -> object:
        return F.layer_norm(x, shape, weight, bias)

    return [
        ("attention", "auto", attention, stock_attention, AUTO_LIMIT_US),
        ("layer_norm", "auto", layer_norm, stock_layer_norm, AUTO_LIMIT_US),
        ("layer_norm + add", "auto", add_norm, stock_add_norm, AUTO_LIMIT_US),
        ("attention", "reference", attention, direct_attention, FORCED_LIMIT_US),
        ("layer_norm", "reference", layer_norm, direct_layer_norm, FORCED_LIMIT_US),
    ]


_IMPORT_PROGRAM = """
import time
import torch
begin = time.perf_counter()
import fused_lm
seconds = time.perf_counter() - begin
import sys
heavy = [name for name in ("triton", "torch._dynamo") if name in sys.modules]
print(seconds, *heavy)
"""


def measure_import() -> tuple[list[Row], list[str]]:
    """Seconds of ``import fused_lm`` after ``import torch``, and forbidden modules it imported."""
    seconds, heavy = [], set()
    command = [sys.executable, "-c", _IMPORT_PROGRAM]
    for _ in range(IMPORT_RUNS):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        first, *names = done.stdout.split()
        seconds.append(float(first))
        heavy.update(names)
    row = Row("import fused_lm after torch", "s", *median_interval(seconds), IMPORT_LIMIT_S)
    return [row], sorted(heavy)


def show(rows: list[Row], heavy: list[str]) -> None:
    """Prints the table."""
    python = f"Python {platform.python_version()} ({platform.python_compiler()})"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {python}")
    print(f"{'what':<44} {'median':>10} {'95 % interval':>22} {'limit':>8}  verdict")
    for row in rows:
        numbers = [row.median, row.low, row.high]
        median, low, high = (_number(value, row.unit) for value in numbers)
        limit = "" if row.limit is None else _number(row.limit, row.unit)
        print(f"{row.name:<44} {median:>10} {low:>10} .. {high:>8} {limit:>8}  {row.verdict}")
    if heavy:
        print(f"OVER: import fused_lm also imported {', '.join(heavy)}")


def _number(value: float, unit: str) -> str:
    return f"{value:+.2%}" if not unit else f"{value:.3f} {unit}"


def main() -> int:
    """Runs the measurements and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=60, help="interleaved pairs of training steps")
    parser.add_argument("--only", choices=("step", "calls", "import"), help="one part only")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures there")
    options = parser.parse_args()
    if options.pairs < 1:
        parser.error(f"--pairs must be at least 1, got {options.pairs}")
    rows: list[Row] = []
    heavy: list[str] = []
    if options.only in (None, "import"):
        rows, heavy = measure_import()
    if options.only in (None, "calls"):
        rows += measure_calls()
    if options.only in (None, "step"):
        rows += measure_step(options.pairs)
    show(rows, heavy)
    if options.json is not None:
        figures = [{**asdict(row), "verdict": row.verdict} for row in rows]
        record = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": figures}
        options.json.write_text(json.dumps({**record, "also_imported": heavy}, indent=1) + "\n")
    return 1 if heavy or any(row.verdict == "OVER" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
