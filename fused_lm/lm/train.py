"""Training a GPT on bytes: one loop, everything it does reported as events.

    plan (plan.py, sizing.py) -> step, step, ... -> final evaluation -> checkpoint -> curve

The loop owns no terminal and no signal: ``on_event`` receives dicts (see :func:`train`) and
``should_stop`` is asked after every step, so a program, a notebook and a test drive it alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fused_lm.lm import checkpoint, plot
from fused_lm.lm.checkpoint import Checkpoint, CheckpointError
from fused_lm.lm.data import BatchSampler, Text, bigram_entropy, split_text, unigram_entropy
from fused_lm.lm.gpt import GPT, GPTConfig
from fused_lm.lm.plan import (
    Emit,
    Plan,
    TrainConfig,
    TrainError,
    open_folder,
    pick_device,
    plan_new,
    plan_resumed,
)
from fused_lm.lm.runlog import FILE_NAME as LOG_NAME
from fused_lm.lm.runlog import RunLog
from fused_lm.lm.schedule import learning_rate
from fused_lm.lm.step import evaluate, make_optimizer, to_device, training_step

SAVE_EVERY_SECONDS = 60.0
NATS_PER_BIT = math.log(2.0)


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        step: Updates taken, those before a resume included.
        interrupted: Whether ``should_stop`` ended it early; then there is no final evaluation.
        validation_bits: Bits per byte of the last evaluation, or None.
        unigram_bits: Entropy of the text's single bytes, in bits.
        parameters: Of the model.
        seconds: Of the run so far, those before a resume included.
        checkpoint, log: Files.
        curve: PNG, or None if it wasn't drawn.
    """

    step: int
    interrupted: bool
    validation_bits: float | None
    unigram_bits: float
    parameters: int
    seconds: float
    checkpoint: Path
    log: Path
    curve: Path | None

    @property
    def ratio(self) -> float | None:
        """Validation bits per byte over unigram entropy."""
        if self.validation_bits is None or self.unigram_bits == 0.0:
            return None
        return self.validation_bits / self.unigram_bits


def train(
    config: TrainConfig,
    model_config: GPTConfig | None,
    text: Text,
    on_event: Emit | None = None,
    should_stop: Callable[[], bool] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    started: float | None = None,
) -> TrainResult:
    """Trains a model on a text, or goes on with a run.

    Args:
        config: Settings.
        model_config: The model; None takes the default shape, or in a timed run the largest that
            the machine can train in the time. A resumed run takes its own.
        text: What to learn.
        on_event: Called with dicts whose "event" is one of: text, measured, begin, step, train,
            validation, saved, warning, end. "train" and "validation" are also the lines of the log.
        should_stop: True ends the run after the step at hand, with a checkpoint.
        clock: Seconds; only differences count.
        started: When the user began to wait, by that clock; default: now.
    Raises:
        DataError, TrainError, CheckpointError: In one sentence.
    """
    start = clock() if started is None else started
    if config.steps is not None and config.minutes is not None:
        raise TrainError("a run's length is either --steps or --minutes; got both.")
    emit: Emit = on_event or (lambda event: None)
    device = pick_device(config.device)
    found = open_folder(config)
    levels = unigram_entropy(text.data), bigram_entropy(text.data)
    emit({"event": "text", "text": text, "unigram_bits": levels[0], "bigram_bits": levels[1]})
    if found is None:
        plan = plan_new(config, model_config, text, device, clock, start, emit)
    else:
        plan = plan_resumed(config, found, text)
    trainer = Trainer(config, plan, text, levels, device, emit, should_stop or (lambda: False))
    if found is not None:
        trainer.restore(found)
    elif config.overwrite:
        (config.out / checkpoint.FILE_NAME).unlink(missing_ok=True)
    threads = torch.get_num_threads()
    try:
        return trainer.run(clock, start)
    finally:
        torch.set_num_threads(threads)


class Trainer:
    """The state of a run and the loop over it."""

    def __init__(
        self,
        config: TrainConfig,
        plan: Plan,
        text: Text,
        levels: tuple[float, float],
        device: torch.device,
        emit: Emit,
        should_stop: Callable[[], bool],
    ) -> None:
        self.config, self.plan, self.text, self.levels = config, plan, text, levels
        self.device, self.emit, self.should_stop = device, emit, should_stop
        torch.manual_seed(plan.seed)
        self.model = GPT(plan.model_config).to(device)
        self.optimizer = make_optimizer(self.model, plan.lr, plan.weight_decay)
        train_windows, self.validation = split_text(text, plan.model_config.context)
        self.sampler = BatchSampler(train_windows, plan.batch, plan.seed)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.step = 0
        self.seconds_before = 0.0
        self.begin_seconds = 0.0
        self.losses: dict[str, float] = {}
        self.file = config.out / checkpoint.FILE_NAME
        self._loss_sum = torch.zeros((), device=device)
        self._loss_count = 0

    def restore(self, found: Checkpoint) -> None:
        """Goes back to the very state in which ``found`` was saved."""
        checkpoint.load_weights(self.model, found)
        checkpoint.load_optimizer(self.optimizer, self.model, found)
        try:
            self.sampler.set_state(found.generators["sampler"])
            torch.set_rng_state(found.generators["torch"])
            if self.device.type == "cuda" and "cuda" in found.generators:
                torch.cuda.set_rng_state(found.generators["cuda"], self.device)
            self.seconds_before = float(found.run["seconds"])
            self.begin_seconds = float(found.run["begin_seconds"])
            self.losses = dict(found.run["losses"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{found.path} lacks the state of its run ({error}); "
                "expected a checkpoint of fused-lm train to resume from."
            ) from error
        self.step = found.step

    def run(self, clock: Callable[[], float], start: float) -> TrainResult:
        """The loop, then the end of the run. ``start`` is when the user began to wait."""
        self._clock, self._start = clock, start
        if self.plan.threads is not None:
            torch.set_num_threads(self.plan.threads)
        try:
            log = RunLog(self.config.out / LOG_NAME, self.step if self.step else None)
        except OSError as error:
            raise TrainError(
                f"{self.config.out / LOG_NAME} can't be written ({error.strerror or error}); "
                "expected a writable folder."
            ) from error
        with log:
            self.log = log
            self._begin()
            interrupted = self._loop()
            if not interrupted:
                interrupted = not self._evaluate(self.config.final_eval_bytes, final=True)
            self._save(final=True)
            curve = None if interrupted else self._draw()
        result = TrainResult(
            step=self.step,
            interrupted=interrupted,
            validation_bits=self.losses.get("validation_bits"),
            unigram_bits=self.levels[0],
            parameters=self.parameters,
            seconds=self._seconds(),
            checkpoint=self.file,
            log=self.log.path,
            curve=curve,
        )
        self.emit({"event": "end", "result": result})
        return result

    def _begin(self) -> None:
        settings = self.plan.settings()
        entry = {
            "kind": "begin",
            "step": self.step,
            "model": self.plan.model_config.to_dict(),
            "parameters": self.parameters,
            "device": self._device_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "unigram_bits": self.levels[0],
            "bigram_bits": self.levels[1],
            **settings,
        }
        self._write(entry)
        expected = self._expected_steps(self.plan.step_seconds)
        self.emit({"event": "begin", "expected_steps": expected, **entry})

    def _loop(self) -> bool:
        """Steps until the run's length is reached (False) or a stop is asked for (True)."""
        plan = self.plan
        if self.step == 0:
            self.begin_seconds = self._seconds()
        self._last_log = self._last_save = self._seconds()
        self._tokens_since_log = 0
        while (progress := self._progress()) < 1.0:
            norm = self._update(progress)
            self.emit({"event": "step", "step": self.step, "progress": progress})
            if self.step % plan.log_every == 0:
                self._log_training(norm)
            if self.step % plan.eval_every == 0:
                self._evaluate(self.config.eval_bytes)
            if self._save_is_due():
                self._save()
            if self.should_stop():
                return True
        return False

    def _update(self, progress: float) -> torch.Tensor:
        """One step. Returns the gradient norm."""
        rate = learning_rate(self.plan.lr, self.step, self.plan.warmup, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = to_device(self.sampler.next(), self.device)
        self.model.train()
        loss, norm = training_step(self.model, self.optimizer, *batch, self.plan.grad_clip)
        self._rate = rate
        self._loss_sum += loss
        self._loss_count += 1
        self._tokens_since_log += batch[0].numel()
        self.step += 1
        return norm

    def _log_training(self, norm: torch.Tensor) -> None:
        loss = self._mean_loss()
        now = self._seconds()
        bits = loss / NATS_PER_BIT
        entry = {
            "kind": "train",
            "step": self.step,
            "loss": loss,
            "bits_per_byte": bits,
            "lr": self._rate,
            "grad_norm": float(norm),
            "tokens_per_s": self._tokens_since_log / max(1e-9, now - self._last_log),
            "elapsed_s": now,
        }
        expected = self._expected_steps((now - self._last_log) / self.plan.log_every)
        self._last_log, self._tokens_since_log = now, 0
        self.losses["train_bits"] = bits
        self._loss_sum.zero_()
        self._loss_count = 0
        self._write(entry)
        self.emit({"event": "train", "expected_steps": expected, **entry})

    def _mean_loss(self) -> float:
        """Mean loss since the last log line; the place where a diverged run is noticed."""
        loss = float(self._loss_sum) / max(1, self._loss_count)
        if not math.isfinite(loss):
            held = f"{self.file} is from before" if self.file.is_file() else "nothing was saved"
            raise TrainError(
                f"the loss is no longer finite at step {self.step} ({held}); try a smaller --lr."
            )
        return loss

    def _evaluate(self, num_bytes: int, final: bool = False) -> bool:
        """Scores the validation text. Returns False if a stop was asked for meanwhile."""
        scored = evaluate(
            self.model, self.validation, num_bytes, self.plan.batch, self.device, self.should_stop
        )
        if scored is None:
            return False
        loss, num_targets = scored
        bits = loss / NATS_PER_BIT
        self.losses["validation_bits"] = bits
        entry = {
            "kind": "validation",
            "step": self.step,
            "loss": loss,
            "bits_per_byte": bits,
            "ratio_to_unigram": bits / self.levels[0] if self.levels[0] else None,
            "bytes": num_targets,
            "final": final,
            "elapsed_s": self._seconds(),
        }
        self._write(entry)
        self.emit({"event": "validation", **entry})
        return True

    def _save_is_due(self) -> bool:
        if self.plan.save_every is not None:
            return self.step % self.plan.save_every == 0
        return self._seconds() - self._last_save >= SAVE_EVERY_SECONDS

    def _save(self, final: bool = False) -> None:
        """Saves; on the way a failure is only a warning, since the run still holds everything."""
        self._mean_loss()
        self._last_save = self._seconds()
        generators = {"sampler": self.sampler.state(), "torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        run = {
            "settings": self.plan.settings(),
            "seconds": self._seconds(),
            "begin_seconds": self.begin_seconds,
            "losses": self.losses,
            "unigram_bits": self.levels[0],
            "text_name": self.text.name,
        }
        try:
            size = checkpoint.save_checkpoint(
                self.file,
                self.model,
                self.plan.model_config.to_dict(),
                step=self.step,
                run=run,
                optimizer=self.optimizer,
                generators=generators,
            )
        except CheckpointError as error:
            if final:
                raise
            self.emit({"event": "warning", "message": f"{error} The run goes on."})
            return
        self.emit({"event": "saved", "step": self.step, "path": self.file, "bytes": size})

    def _draw(self) -> Path | None:
        if not self.config.plot:
            return None
        shape = self.plan.model_config
        title = (
            f"GPT, {self.parameters / 1e6:.2f} M parameters, on {self.text.name}\n"
            f"{shape.num_layers} layers x {shape.embed_dim}, context {shape.context}, "
            f"batch {self.plan.batch}, {self.step} steps in {self._seconds():.0f} s "
            f"on {self._device_name()}"
        )
        path = self.config.out / plot.FILE_NAME
        unigram_bits, bigram_bits = self.levels
        try:
            return plot.draw_curve(
                self.log.entries,
                path,
                title=title,
                unigram_bits=unigram_bits,
                bigram_bits=bigram_bits,
            )
        except (ImportError, OSError) as error:
            self.emit({"event": "warning", "message": f"{path} was not drawn ({error})."})
            return None

    def _write(self, entry: dict[str, Any]) -> None:
        before = self.log.problem
        self.log.write(entry)
        if self.log.problem and not before:
            self.emit({"event": "warning", "message": f"{self.log.problem}; the run goes on."})

    def _seconds(self) -> float:
        return self.seconds_before + self._clock() - self._start

    def _progress(self) -> float:
        return self.plan.length.progress(self.step, self._seconds(), self.begin_seconds)

    def _expected_steps(self, step_seconds: float) -> int:
        return self.plan.length.expected_steps(self.step, self._seconds(), step_seconds)

    def _device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        count = torch.get_num_threads()
        return f"{self.device.type} ({count} thread{'s' if count > 1 else ''})"
