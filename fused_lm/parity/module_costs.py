"""What a module costs before and after ``fuse()``: time and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fused_lm import dispatch
from fused_lm.parity.module import Pair
from fused_lm.parity.module_runs import Results, backward, cotangents_of, mapped, named
from fused_lm.parity.timing import interleaved_medians, median

MOST_ROUNDS = 200

Measured = tuple[str, float, float]  # what, of the stock module, of the fused one


def speed(pair: Pair, seconds: float = 4.0) -> list[Measured]:
    """Median microseconds of forward, without gradients, and of forward and backward; on a GPU its
    own time, on a CPU the wall's. The modules must be callable again and again.
    """
    calls = [_call(pair, fused, way) for way in (False, True) for fused in (False, True)]
    if pair.device.type == "cuda":
        with torch.cuda.device(pair.device):  # flushes take several times as long
            found = interleaved_medians(calls, seconds / 8, least=5)
    else:
        found = _wall_medians(calls, seconds)
    passes = ("forward, no gradients", "forward and backward")
    return list(zip(passes, found[::2], found[1::2], strict=True))


def memory(pair: Pair) -> Measured:
    """On a GPU the peak of forward and backward beyond what was there before: activations and
    gradients. On a CPU the bytes that the forward keeps for the backward, without parameters.
    """
    on_gpu = pair.device.type == "cuda"
    measure = _peak_bytes if on_gpu else _saved_bytes
    what = "peak of forward and backward beyond weights" if on_gpu else "kept for the backward"
    return what, measure(pair, False), measure(pair, True)


def _call(pair: Pair, fused: bool, training: bool) -> Callable[[], None]:
    """A call to measure, without the copies of :mod:`fused_lm.parity.module_runs`."""
    module = pair.fused if fused else pair.stock
    backend = pair.backend if fused else dispatch.current_backend()
    fed = mapped(pair.inputs, lambda _, t: t.clone())
    tensors = [leaf for leaf in pytree.tree_leaves(fed) if isinstance(leaf, Tensor)]
    leaves = [*(t.requires_grad_() for t in tensors if t.is_floating_point()), *module.parameters()]
    cotangents: Results = {}

    def call() -> None:
        with dispatch.use_backend(backend), torch.set_grad_enabled(training):
            outputs = named(module(*fed.args, **fed.kwargs), "out")
            if training:
                cotangents.update({} if cotangents else cotangents_of(outputs))
                backward(outputs, cotangents)
        for leaf in leaves:
            leaf.grad = None

    return call


def _wall_medians(calls: Sequence[Callable[[], None]], seconds: float) -> list[float]:
    """In turn, so that what else the machine does reaches all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = perf_counter() + seconds
    while not times[0] or (perf_counter() < end and len(times[0]) < MOST_ROUNDS):
        for call, found in zip(calls, times, strict=True):
            begin = perf_counter()
            call()
            found.append((perf_counter() - begin) * 1e6)
    return [median(found) for found in times]


def _peak_bytes(pair: Pair, fused: bool) -> int:
    call = _call(pair, fused, True)
    call()  # handles and workspaces that stay
    before = torch.cuda.memory_allocated(pair.device)
    torch.cuda.reset_peak_memory_stats(pair.device)
    call()
    return torch.cuda.max_memory_allocated(pair.device) - before


def _saved_bytes(pair: Pair, fused: bool) -> int:
    """Each storage once; held, so that none is freed and its address taken by the next."""
    module = pair.fused if fused else pair.stock
    own = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers())}
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _call(pair, fused, True)()
    return sum(storage.nbytes() for address, storage in held.items() if address not in own)
