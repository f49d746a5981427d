"""Products of linear layers on the harness, by the kernels for Hopper or by those for every GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.linear_act_hopper_calls import Call, Data, total_of
from tests.simt import runtime


@dataclass(frozen=True)
class Products:
    """One kind of kernels; each method takes a harness in whatever schedule it is."""

    hopper: bool

    def call(
        self, harness: runtime.Harness, op: str, *arguments: Any, sms: int = 2
    ) -> Sequence[Tensor]:
        with harness.choosing(hopper=self.hopper, multiprocessors=sms):
            found: Sequence[Tensor] = harness.call(op, *arguments)
        return found

    def forward(self, harness: runtime.Harness, data: Data) -> Sequence[Tensor]:
        """y and pre."""
        return self.call(harness, "linear_act_fwd", *data.forward, sms=data.call.sms)

    def backward(self, harness: runtime.Harness, data: Data) -> Sequence[Tensor]:
        """dx, dweight or the total that it was added to, dbias."""
        arguments, sms = data.backward(data.saved()), data.call.sms
        if data.call.total is None:
            return self.call(harness, "linear_act_bwd", *arguments, sms=sms)
        total = total_of(data)
        dx, none, dbias = self.call(
            harness, "linear_act_bwd_add", *arguments[:-1], False, total, sms=sms
        )
        assert none.numel() == 0
        return dx, total, dbias

    def back_through(self, harness: runtime.Harness, data: Data) -> Sequence[Tensor]:
        """dpre and dbias."""
        return self.call(harness, "ffn_dpre", *data.dpre, sms=data.call.sms)


def in_schedules(harness: runtime.Harness, run: Any, data: Any) -> Sequence[Tensor]:
    """What all schedules agree on, to the bit."""
    results = {}
    for seed in (0, 11):
        harness.configure(runtime.Schedule.of_seed(seed))
        results[seed] = run(harness, data)
    first: Sequence[Tensor] = results[0]
    equal = all(same_bits(a, b) for a, b in zip(first, results[11], strict=True))
    assert equal, "two schedules differ"
    return first


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def parameters(calls: Sequence[Call], few: Sequence[Call]) -> list[Any]:
    """Beyond a few they wait for `make test-all`."""
    return [
        pytest.param(call, id=call.why, marks=[] if call in few else [pytest.mark.slow])
        for call in calls
    ]
