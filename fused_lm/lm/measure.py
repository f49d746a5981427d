"""What a shape costs here: the models of the ladder, and training steps of them, timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fused_lm.lm import sizing
from fused_lm.lm.corpus import Corpus
from fused_lm.lm.data import BatchSampler
from fused_lm.lm.gpt import GPT, GPTConfig
from fused_lm.lm.precision import Precision
from fused_lm.lm.settings import TrainConfig, TrainError
from fused_lm.lm.step import LossModule, make_optimizer, to_device, training_step
from fused_lm.lm.text import DataError

DEFAULT_GRAD_CLIP = 1.0


def config_of(rung: sizing.Rung, fields: dict[str, Any]) -> GPTConfig:
    """The model of a rung, with the user's fields on top."""
    shape: dict[str, Any] = {
        "context": rung.context,
        "num_layers": rung.layers,
        "embed_dim": rung.width,
        "num_heads": rung.heads,
        "activation": rung.activation,
        # 500 steps of 2 layers x 128: 2.45 bits per byte; learned positions 2.88.
        "positions": "rotary",
    }
    try:
        return GPTConfig(**(shape | fields))
    except (TypeError, ValueError) as error:
        raise TrainError(str(error)) from error


def ladder_for(config: TrainConfig, corpus: Corpus) -> tuple[sizing.Rung, ...]:
    """The ladder with the user's context and batch, as far as the text is long enough."""
    rungs: list[sizing.Rung] = []
    for rung in sizing.LADDER:
        rung = replace(
            rung,
            context=config.model_fields.get("context", rung.context),
            batch=config.batch or rung.batch,
        )
        try:
            corpus.split(rung.context)
        except DataError:
            if not rungs:
                raise
            break
        rungs.append(rung)
    return tuple(rungs)


class RungTimer:
    """Times training steps of rungs on real batches; on a CPU with the best number of threads.

    It runs in one process, with the share of a batch that each process of a team will have.

    A larger model wants no fewer threads than a smaller one, so each rung is tried with at most
    twice the best number of the one before.
    """

    def __init__(
        self,
        config: TrainConfig,
        model_config: GPTConfig | None,
        corpus: Corpus,
        device: torch.device,
        precision: Precision,
        clock: Callable[[], float],
        processes: int = 1,
    ) -> None:
        self.config, self.model_config, self.corpus = config, model_config, corpus
        self.device, self.precision, self.clock = device, precision, clock
        self.processes = processes
        self._most_threads = torch.get_num_threads()

    def __call__(self, rung: sizing.Rung) -> sizing.Cost:
        config, device = self.config, self.device
        torch.manual_seed(config.seed)
        model = GPT(self.model_config or config_of(rung, config.model_fields)).to(device)
        module = LossModule(model)
        optimizer = make_optimizer(model, 1e-4, config.weight_decay)
        train, _ = self.corpus.split(model.config.context)
        batch = max(1, (config.batch or rung.batch) // self.processes)
        sampler = BatchSampler(train, batch, config.seed)
        scaler = self.precision.make_scaler()

        def step() -> None:
            training_step(
                module,
                optimizer,
                *to_device(sampler.next(), device),
                config.grad_clip or DEFAULT_GRAD_CLIP,
                self.precision,
                accumulate=min(batch, config.accumulate or 1),
                scaler=scaler,
            )
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        parameters = sum(p.numel() for p in model.parameters())
        if device.type != "cpu":
            return sizing.Cost(parameters, sizing.time_step(step, self.clock))
        return sizing.Cost(parameters, *self._time_with_threads(step))

    def _time_with_threads(self, step: Callable[[], None]) -> tuple[float, int]:
        before = torch.get_num_threads()

        def seconds_with(count: int) -> float:
            torch.set_num_threads(count)
            return sizing.time_step(step, self.clock)

        try:
            seconds, threads = sizing.fastest_threads(self._most_threads, seconds_with)
        finally:
            torch.set_num_threads(before)
        self._most_threads = min(before, 2 * threads)
        return seconds, threads
