"""What this GPU can do at most, by measurement: ``python -m benchmarks.roofs --out DIR``.

copy: bytes read and written per second by ``Tensor.copy_`` of 1 GiB. matmul: FLOP per second of
cuBLAS in bf16, 8192 in each dim, of random numbers: zeros run faster. launch: the host's time per
launch of a kernel that has next to nothing to do, through PyTorch's eager operator.

``--device cpu`` runs the same on tiny tensors, and says so in every line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from fused_lm.parity.timing import interleaved_medians

COPY_BYTES, DRY_COPY_BYTES = 1 << 30, 1 << 20
MATMUL, DRY_MATMUL = 8192, 64
LAUNCHES, DRY_LAUNCHES = 2000, 20
ROUNDS = 5


def roofs(device: torch.device) -> Iterator[dict[str, Any]]:
    """One line per roof: its name, value and unit."""
    yield {"roof": "copy", "value": _copied_tb_s(device), "unit": "TB/s"}
    yield {"roof": "matmul bf16", "value": _matmul_tflops(device), "unit": "TFLOP/s"}
    yield {"roof": "launch", "value": _launch_us(device), "unit": "us of the host"}


def _copied_tb_s(device: torch.device) -> float:
    size = DRY_COPY_BYTES if device.type == "cpu" else COPY_BYTES
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _median_us(lambda: target.copy_(source), device) / 1e6


def _matmul_tflops(device: torch.device) -> float:
    size = DRY_MATMUL if device.type == "cpu" else MATMUL
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2.0 * size**3 / _median_us(lambda: a @ b, device) / 1e6


def _median_us(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        return interleaved_medians([call], seconds=0.3)[0]
    times = []
    for _ in range(ROUNDS):
        begin = perf_counter()
        call()
        times.append((perf_counter() - begin) * 1e6)
    return sorted(times)[ROUNDS // 2]


def _launch_us(device: torch.device) -> float:
    """The host's median time per launch, in rounds that begin with an empty queue."""
    x = torch.zeros(1, device=device)
    launches = DRY_LAUNCHES if device.type == "cpu" else LAUNCHES
    times = []
    for _ in range(ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = perf_counter()
        for _ in range(launches):
            x.add_(1.0)
        times.append((perf_counter() - begin) * 1e6 / launches)
    return sorted(times)[ROUNDS // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for roofs.jsonl")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args()
    device = torch.device(args.device)
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    label = {"device": device.type, "gpu": gpu, "torch": torch.__version__}
    lines = []
    for line in roofs(device):
        lines.append({**line, "value": float(f"{line['value']:.4g}"), **label})
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            with (args.out / "roofs.jsonl").open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    found = ", ".join(f"{line['roof']} {line['value']:g} {line['unit']}" for line in lines)
    print(f"{gpu or 'a CPU, tiny tensors'}: {found}")


if __name__ == "__main__":
    main()
