"""Everything random in a run, into a checkpoint and back: the order of the text, dropout, Python's.

sampler                  the order of the text, the same in every process
python                   Python's own generator, of the first process
torch, torch.1, ...      torch's on the CPU, of each process
cuda, cuda.1, ...        torch's on each process' GPU
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

import torch
from torch import Tensor

from fused_lm.lm.data import BatchSampler
from fused_lm.lm.parallel import Team

_BETWEEN_SEEDS = 1_000_003


def seed_all(seed: int) -> None:
    """Seeds Python's and torch's generators, the same in every process."""
    random.seed(seed)
    torch.manual_seed(seed)


def part_ways(seed: int, step: int, team: Team) -> None:
    """Gives every process but the first dropout of its own."""
    if not team.is_first:
        torch.manual_seed(seed + _BETWEEN_SEEDS * (team.rank + team.size * step))


def generator_states(sampler: BatchSampler, device: torch.device, team: Team) -> dict[str, Tensor]:
    """Name -> uint8 state, the same in every process; every process calls it."""
    python = json.dumps(random.getstate()).encode()
    states = {"sampler": sampler.state(), "python": torch.tensor(list(python), dtype=torch.uint8)}
    for rank, state in enumerate(team.gather(torch.get_rng_state())):
        states[_name("torch", rank)] = state
    if device.type == "cuda":
        for rank, state in enumerate(team.gather(torch.cuda.get_rng_state(device))):
            states[_name("cuda", rank)] = state
    return states


def restore_generators(
    states: Mapping[str, Tensor], sampler: BatchSampler, device: torch.device, team: Team
) -> bool:
    """Goes back to stored states.

    Returns:
        Whether this process had one; another number of processes leaves some without.
    Raises:
        KeyError, RuntimeError, TypeError, ValueError: If a state is missing or none.
    """
    sampler.set_state(states["sampler"])
    if "python" in states:
        version, numbers, gauss = json.loads(bytes(states["python"].tolist()))
        random.setstate((version, tuple(numbers), gauss))
    if team.is_first or _name("torch", team.rank) in states:
        torch.set_rng_state(states[_name("torch", team.rank)])
        if device.type == "cuda" and _name("cuda", team.rank) in states:
            torch.cuda.set_rng_state(states[_name("cuda", team.rank)], device)
        return True
    return False


def _name(kind: str, rank: int) -> str:
    return f"{kind}.{rank}" if rank else kind
