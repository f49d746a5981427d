"""Attention against PyTorch's backends on a GPU: ``python -m benchmarks.attention --out DIR``.

Forward and backward apart, at 16k tokens in all as the field's tables have it. A backend whose
output or gradient of q, k or v is off on one head gets no number; under dropout, where each draws
its own, none is held. Calls take turns behind a flushed L2, so they share clocks and temperature;
the time is a median of CUDA events, and of the GPU alone: a spin before each call hides the host's
work.

FLOPs are those of the pairs that causality lets through, whatever a key mask hides and a kernel
multiplies: 4 D a pair in the forward, 2.5 times that in the backward.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fused_lm
from fused_lm.parity.timing import interleaved_medians

MOST_ERROR = 2e-2
"""Norm of the difference to fp64 over fp64's: 16-bit operands are at 1e-3 to 1e-2."""
BACKWARD_FLOPS = 2.5
SECONDS_PER_CALL = 0.05


@dataclass(frozen=True)
class Case:
    """One attention in self-attention's shape, S = T; ``group`` query heads share a key head."""

    D: int
    T: int
    features: tuple[str, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    group: int = 1
    tokens: int = 16384
    model_dim: int = 2048

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        shared = f" gqa{self.group}" if self.group > 1 else ""
        return f"{'+'.join(self.features) or 'full'} d{self.D} t{self.T}{shared} {dtype}"

    @property
    def heads(self) -> int:
        return self.model_dim // self.D

    @property
    def batch(self) -> int:
        return max(1, self.tokens // self.T)

    def flops(self) -> float:
        pairs = self.T * (self.T + 1) / 2 if "causal" in self.features else self.T * self.T
        return 4.0 * self.batch * self.heads * pairs * self.D


def grid() -> list[Case]:
    """In order of worth, each shape causal and full."""
    shapes = [
        *((D, T) for D in (128, 64) for T in (4096, 1024, 16384, 512)),
        *((D, T) for D in (256, 96, 32, 192) for T in (4096,)),
    ]
    cases = [Case(D, T, f) for D, T in shapes for f in (("causal",), ())]
    causal = Case(128, 4096, ("causal",))
    cases += [replace(causal, group=4), replace(causal, dtype=torch.float16)]
    cases += [
        Case(64, 1024, features)
        for features in (("bias",), ("key_mask",), ("causal", "dropout"), ("causal", "bias"))
    ]
    return cases


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    key_mask: Tensor | None

    def leaves(self) -> list[Tensor]:
        return [t for t in self[:4] if t is not None]


def inputs_of(case: Case) -> Inputs:
    B, T = case.batch, case.T

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=case.dtype).requires_grad_()

    key_heads = case.heads // case.group
    bias = randn(1, case.heads, T, T) if "bias" in case.features else None
    key_mask = None
    if "key_mask" in case.features:
        lengths = torch.linspace(T // 2, T, B, device="cuda").long()
        key_mask = torch.arange(T, device="cuda") < lengths[:, None]
    q = randn(B, case.heads, T, case.D)
    k, v = (randn(B, key_heads, T, case.D) for _ in range(2))
    return Inputs(q, k, v, bias, key_mask)


def ours(case: Case, given: Inputs) -> Tensor:
    out: Tensor = fused_lm.attention(
        *(given.q, given.k, given.v),
        bias=given.bias,
        key_mask=given.key_mask,
        causal="causal" in case.features,
        dropout_p=0.1 if "dropout" in case.features else 0.0,
    )
    return out


def theirs(case: Case, given: Inputs) -> Tensor:
    """PyTorch's operator, which takes causal or a mask, not both: they are merged before."""
    causal = "causal" in case.features
    mask = given.bias
    if given.key_mask is not None:
        mask = given.key_mask[:, None, None, :]
    if causal and mask is not None:
        hidden = torch.ones(case.T, case.T, dtype=torch.bool, device="cuda").triu(1)
        hides = mask.dtype == torch.bool
        mask = mask & ~hidden if hides else mask.masked_fill(hidden, float("-inf"))
        causal = False
    return F.scaled_dot_product_attention(
        *(given.q, given.k, given.v),
        attn_mask=mask,
        is_causal=causal,
        dropout_p=0.1 if "dropout" in case.features else 0.0,
        enable_gqa=case.group > 1,
    )


class Backend(NamedTuple):
    name: str
    call: Callable[[Case, Inputs], Tensor]
    chosen: Callable[[], AbstractContextManager[Any]]


BACKENDS = [
    *(
        Backend(name, ours, lambda name=name: fused_lm.use_backend(name))  # type: ignore[misc]
        for name in ("cuda", "triton")
    ),
    *(
        Backend(f"sdpa-{name}", theirs, lambda kind=kind: sdpa_kernel(kind))  # type: ignore[misc]
        for name, kind in (
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("cudnn", SDPBackend.CUDNN_ATTENTION),
            ("efficient", SDPBackend.EFFICIENT_ATTENTION),
        )
    ),
]


def one_head(case: Case, given: Inputs, dout: Tensor) -> list[Tensor]:
    """fp64's output and gradients of q, k and v, of the first batch and key head."""
    group, bias = case.group, given.bias
    parts = [given.q[:1, :group], given.k[:1, :1], given.v[:1, :1]]
    leaves = [t.detach().double().requires_grad_() for t in parts]
    with fused_lm.use_backend("reference"):
        out = fused_lm.attention(
            *leaves,
            bias=None if bias is None else bias[:, :group].detach().double(),
            key_mask=None if given.key_mask is None else given.key_mask[:1],
            causal="causal" in case.features,
        )
    return [out.detach(), *torch.autograd.grad(out, leaves, dout[:1, :group].double())]


def error_of(case: Case, got: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """The largest over output and gradients; NaN if any is."""
    errors = []
    for mine, truth in zip(got, exact, strict=False):
        part = mine[:1, : truth.shape[1]].double()
        errors.append((part - truth).norm() / truth.norm().clamp_min(1e-30))
    return float(torch.stack(errors).max())


def results_of(case: Case) -> Iterator[dict[str, Any]]:
    """One line per backend: what it took, or why it was not timed."""
    torch.manual_seed(0)
    given = inputs_of(case)
    leaves = given.leaves()
    dout = torch.randn_like(given.q)
    exact = None if "dropout" in case.features else one_head(case, given, dout)
    forwards: dict[str, Callable[[], Any]] = {}
    backwards: dict[str, Callable[[], Any]] = {}
    for backend in BACKENDS:
        label = {"case": case.name, "backend": backend.name}
        try:
            with backend.chosen():
                out = backend.call(case, given)
            gradients = torch.autograd.grad(out, leaves, dout, retain_graph=True)
            if exact is not None:
                error = error_of(case, (out.detach(), *gradients), exact)
                if not error <= MOST_ERROR:
                    yield {**label, "problem": f"error {error:.3g}, allowed {MOST_ERROR:g}"}
                    continue
        except (RuntimeError, ValueError) as error:  # what a backend refuses, in its words
            yield {**label, "problem": str(error).split("\n")[0][:160]}
            continue
        forwards[backend.name] = _forward(backend, case, given)
        backwards[backend.name] = _backward(out, leaves, dout)
    for way, calls, factor in (("fwd", forwards, 1.0), ("bwd", backwards, BACKWARD_FLOPS)):
        if not calls:
            continue
        times = interleaved_medians(list(calls.values()), SECONDS_PER_CALL * len(calls), least=5)
        for name, us in zip(calls, times, strict=True):
            tflops = factor * case.flops() / us / 1e6
            yield {
                "case": case.name, "backend": name, "pass": way,
                "us": round(us, 1), "tflops": round(tflops, 1),
            }  # fmt: skip


def _forward(backend: Backend, case: Case, given: Inputs) -> Callable[[], None]:
    def run() -> None:
        with backend.chosen(), torch.no_grad():
            backend.call(case, given)

    return run


def _backward(out: Tensor, leaves: list[Tensor], dout: Tensor) -> Callable[[], None]:
    def run() -> None:
        torch.autograd.grad(out, leaves, dout, retain_graph=True)

    return run


def table(lines: Iterable[dict[str, Any]]) -> str:
    """TFLOP/s, a row per case and pass, a column per backend."""
    names = [backend.name for backend in BACKENDS]
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for line in lines:
        if "tflops" in line:
            rows.setdefault((line["case"], line["pass"]), {})[line["backend"]] = line["tflops"]
    width = max((len(case) for case, _ in rows), default=4)
    text = [f"{'TFLOP/s':{width}} pass " + " ".join(f"{name:>14}" for name in names)]
    for (case, way), found in rows.items():
        cells = (f"{found[name]:14.0f}" if name in found else f"{'-':>14}" for name in names)
        text.append(f"{case:{width}} {way:4} " + " ".join(cells))
    return "\n".join(text)


def race(
    cases: Iterable[Case], head: dict[str, Any], file: Path | None, end: float
) -> tuple[list[dict[str, Any]], int]:
    """The lines of all cases that the time (time.monotonic) is enough for, and how many it is not.
    What a file has of this GPU and commit is not measured again.
    """
    lines: list[dict[str, Any]] = []
    known: dict[str, list[dict[str, Any]]] = {}
    if file is not None and file.is_file():
        for line in map(json.loads, file.read_text().splitlines()):
            if all(line.get(name) == head[name] for name in ("gpu", "torch", "commit")):
                known.setdefault(line["case"], []).append(line)
    missed = 0
    for case in cases:
        found = known.get(case.name)
        if found is None and time.monotonic() >= end:
            missed += 1
            continue
        if found is None:
            found = _measured(case)
            if file is not None:
                with file.open("a") as out:
                    out.writelines(json.dumps({**head, **line}) + "\n" for line in found)
        lines += found
    return lines, missed


def _measured(case: Case) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    try:
        lines += results_of(case)
    except torch.OutOfMemoryError as error:
        lines.append({"case": case.name, "problem": str(error).split("\n")[0]})
    torch.cuda.empty_cache()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, help="folder for attention.jsonl, which is gone on with"
    )
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--only", default="", help="cases with this in their names")
    parser.add_argument("--commit", default="", help="what is written beside the numbers")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.attention needs a GPU")
    head = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": args.commit,
        "date": datetime.date.today().isoformat(),
    }
    end = time.monotonic() + 60.0 * args.minutes
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    cases = [case for case in grid() if args.only in case.name]
    lines, missed = race(cases, head, args.out / "attention.jsonl" if args.out else None, end)
    for line in lines:
        if "problem" in line:
            print(f"{line['case']}, {line.get('backend', '')}: {line['problem']}")
    print(table(lines))
    print(json.dumps(head))
    left = f", {missed} not reached: run it again, it goes on there" if missed else ""
    print(f"{len(cases) - missed} cases{left}")


if __name__ == "__main__":
    main()
