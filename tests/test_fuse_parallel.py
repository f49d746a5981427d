"""``fuse()`` and the wrappers of torch.distributed, in a group of one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fused_lm
from fused_lm.nn import TransformerEncoderLayer
from tests import taken

C, H = 16, 2


@pytest.fixture(scope="module", autouse=True)
def _group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(Path(tmp_path_factory.mktemp("group")) / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _sharded(model: nn.Module) -> nn.Module:
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for layer in model:  # type: ignore[attr-defined]
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS = {
    "DistributedDataParallel": DistributedDataParallel,
    "fully_shard": _sharded,
    "FSDP": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
}


def _model() -> nn.Module:
    torch.manual_seed(1)
    layers = (nn.TransformerEncoderLayer(C, H, 2 * C, 0.0, batch_first=True) for _ in range(2))
    return nn.Sequential(*layers)


def _step(model: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    out = model(x)
    out.square().sum().backward()
    grads = [p.grad for p in model.parameters()]
    return out.detach(), [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["DistributedDataParallel", "fully_shard"])
def test_a_fused_model_is_wrapped_and_trains(name: str) -> None:
    plain = _model()
    ours = copy.deepcopy(plain)
    fused_lm.fuse(ours)
    x = torch.randn(3, 6, C)
    wanted, wanted_grads = _step(plain, x)
    with fused_lm.use_backend("reference"), taken.choices() as made:
        got, grads = _step(WRAPPERS[name](ours), x)
    assert {op for op, _ in made} == {"attention", "layer_norm", "ffn"}
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(grads, wanted_grads, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRAPPERS)
def test_later_than_the_wrapper_is_refused(name: str) -> None:
    model = WRAPPERS[name](_model())
    for late in (model, nn.Sequential(model)):
        with pytest.raises(RuntimeError, match=f"fuse the model before {name}, which has"):
            fused_lm.fuse(late)
    assert not any(isinstance(m, TransformerEncoderLayer) for m in model.modules())
