"""The state of a run and the loop over it, in one process of a team."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from fused_lm.lm import checkpoint, restore, runlog
from fused_lm.lm.checkpoint import Checkpoint, CheckpointError
from fused_lm.lm.corpus import Corpus
from fused_lm.lm.data import BatchSampler
from fused_lm.lm.gpt import GPT
from fused_lm.lm.metrics import NATS_PER_BIT, RunningLoss, evaluate, perplexity
from fused_lm.lm.parallel import PeerError, Team
from fused_lm.lm.plan import Plan, is_finished
from fused_lm.lm.precision import pick_precision
from fused_lm.lm.report import Report
from fused_lm.lm.schedule import learning_rate
from fused_lm.lm.settings import Emit, TrainConfig, TrainError
from fused_lm.lm.state import generator_states, part_ways, restore_generators, seed_all
from fused_lm.lm.step import LossModule, make_optimizer, to_device, training_step

SAVE_EVERY_SECONDS = 60.0


class Trainer:
    """A run from its plan, or from the checkpoint ``found``, to its end."""

    def __init__(
        self,
        config: TrainConfig,
        plan: Plan,
        corpus: Corpus,
        levels: tuple[float, float],
        device: torch.device,
        emit: Emit,
        should_stop: Callable[[], bool] | None,
        team: Team,
        found: Checkpoint | None,
    ) -> None:
        self.config, self.plan, self.corpus, self.levels = config, plan, corpus, levels
        self.device, self.emit, self.team = device, emit, team
        self.should_stop = should_stop or (lambda: False)
        self.precision = pick_precision(plan.precision, device)
        self.byte_lengths = corpus.tokenizer.byte_lengths()
        seed_all(plan.seed)
        self.model = GPT(plan.model_config).to(device)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        if found is not None:
            restore.load_weights(self.model, found)
        if plan.compile:
            for block in self.model.blocks:
                block.compile()
        self.root = LossModule(self.model)
        self.module = team.wrap(self.root, list(self.model.blocks))
        self.optimizer = make_optimizer(self.model, plan.lr, plan.weight_decay)
        self.scaler = self.precision.make_scaler()
        train_windows, self.validation = corpus.split(plan.model_config.context)
        self.sampler = BatchSampler(train_windows, plan.batch, plan.seed, team.rank, team.size)
        part_ways(plan.seed, 0, team)
        self.step = 0
        self.seconds_before = 0.0
        self.begin_seconds = 0.0
        self.losses: dict[str, float] = {}
        self.file = config.out / checkpoint.FILE_NAME
        self.log_path = config.out / runlog.FILE_NAME
        self._running = RunningLoss(device, self.byte_lengths, team)
        self._norm: torch.Tensor | None = None
        self._was_finished = found is None or is_finished(found)
        if found is not None:
            self._restore(found)

    def _restore(self, found: Checkpoint) -> None:
        """Goes back to the very state in which ``found`` was saved; the weights are in place."""
        restore.load_optimizer(self.optimizer, self.model, found)
        try:
            run = found.run
            if not restore_generators(found.generators, self.sampler, self.device, self.team):
                part_ways(self.plan.seed, found.step, self.team)
            if self.scaler is not None:
                self.scaler.load_state_dict(run["scaler"])
            self.seconds_before = float(run["seconds"])
            self.begin_seconds = float(run["begin_seconds"])
            self.losses = dict(run["losses"])
            if "since_log" in run:
                self._running.restore(run["since_log"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{found.path} lacks the state of its run ({error}); "
                "expected a checkpoint of fused-lm train to resume from."
            ) from error
        self.step = found.step

    def run(self, clock: Callable[[], float], start: float) -> tuple[bool, Path | None]:
        """The loop, then the end of the run.

        Args:
            clock: Seconds. start: When the user began to wait, by that clock.
        Returns:
            Whether it was interrupted, and the curve, if one was drawn.
        """
        self._clock, self._start = clock, start
        if self.plan.threads is not None:
            torch.set_num_threads(self.plan.threads)
        self.report: Report | None = None
        self.team.from_first(self._open_report)
        with self.report or nullcontext():
            self._begin()
            interrupted = self._loop()
            if not interrupted:
                interrupted = not self._evaluate(self.config.final_eval_tokens, final=True)
            self._save(final=True, finished=not interrupted)
            return interrupted, None if interrupted else self._draw()

    def _open_report(self) -> None:
        resumed_step = self.step if self.step else None
        self.report = Report(
            self.config.out, self.emit, resumed_step, self._was_finished, self.config.tensorboard
        )

    def _begin(self) -> None:
        entry = {
            "kind": "begin",
            "step": self.step,
            "model": self.plan.model_config.to_dict(),
            "parameters": self.parameters,
            "device": self._device_name(),
            "parallel": self.team.kind,
            "processes": self.team.size,
            "torch": torch.__version__,
            "unigram_bits": self.levels[0],
            "bigram_bits": self.levels[1],
            **self.plan.settings(),
            "threads": torch.get_num_threads(),
            "precision": self.precision.name,
        }
        self._write(entry, expected_steps=self._expected_steps(self.plan.step_seconds))

    def _loop(self) -> bool:
        """Steps until the run's length is reached (False) or a stop is asked for (True)."""
        plan = self.plan
        if self.step == 0:
            self.begin_seconds = self.seconds()
        self._last_log = self._last_save = self.seconds()
        self._tokens_since_log = 0
        progress, _, _ = self.team.decide(self._progress(), False, False)
        while progress < 1.0:
            norm = self._update(progress)
            self.emit({"event": "step", "step": self.step, "progress": progress})
            if self.step % plan.log_every == 0:
                self._log_training(norm)
            if self.step % plan.eval_every == 0:
                self._evaluate(self.config.eval_tokens)
            save, stop = self._save_is_due(), self.should_stop()
            progress, save, stop = self.team.decide(self._progress(), save, stop)
            if save:
                self._save()
            if stop:
                return True
        return False

    def _update(self, progress: float) -> torch.Tensor:
        """One step. Returns the gradient norm."""
        rate = learning_rate(self.plan.lr, self.step, self.plan.warmup, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        tokens, targets = self.sampler.next()
        self.model.train()
        loss, norm = training_step(
            self.module,
            self.optimizer,
            *to_device((tokens, targets), self.device),
            self.plan.grad_clip,
            self.precision,
            accumulate=self.plan.accumulate,
            scaler=self.scaler,
            team=self.team,
        )
        self._rate, self._norm = rate, norm
        self._running.add(loss, targets)
        self._tokens_since_log += self._tokens_per_step()
        self.step += 1
        return norm

    def _tokens_per_step(self) -> int:
        return self.plan.batch * self.plan.model_config.context

    def _log_training(self, norm: torch.Tensor) -> None:
        since_log = self._since_log()
        loss = since_log["loss_sum"] / since_log["count"]
        now = self.seconds()
        tokens = since_log["count"] * self._tokens_per_step()
        bits = loss / NATS_PER_BIT * (tokens / since_log["bytes"])
        entry = {
            "kind": "train",
            "step": self.step,
            "loss": loss,
            "bits_per_byte": bits,
            "perplexity": perplexity(loss),
            "lr": self._rate,
            "grad_norm": float(norm),
            "tokens_per_s": self._tokens_since_log / max(1e-9, now - self._last_log),
            "elapsed_s": now,
        }
        if self.scaler is not None:
            entry["loss_scale"] = self.scaler.get_scale()
        expected = self._expected_steps((now - self._last_log) / self.plan.log_every)
        self._last_log, self._tokens_since_log = now, 0
        self.losses["train_bits"] = bits
        self._running.reset()
        self._write(entry, expected_steps=expected)

    def _since_log(self) -> dict[str, Any]:
        """Losses since the last log line; here a diverged run is noticed."""
        state = self._running.state()
        self._must_be_finite("loss", state["loss_sum"])
        # A scaler looks for gradients that are not finite, and leaves out their step.
        if self._norm is not None and self.scaler is None:
            self._must_be_finite("gradient", float(self._norm))
        return state

    def _must_be_finite(self, what: str, value: float) -> None:
        """All processes see the same value, and one of them says what is wrong with it."""
        if math.isfinite(value):
            return
        held = f"{self.file} is from before" if self.file.is_file() else "nothing was saved"
        raise (TrainError if self.team.is_first else PeerError)(
            f"the {what} is no longer finite at step {self.step} ({held}); start again with a "
            "smaller --lr."
        )

    def _evaluate(self, num_tokens: int, final: bool = False) -> bool:
        """Scores the validation text. Returns False if a stop was asked for meanwhile."""
        score = evaluate(
            self.root,
            self.validation,
            num_tokens,
            self.plan.batch,
            self.precision,
            self.byte_lengths,
            self.should_stop,
            self.team,
        )
        if score is None:
            return False
        bits = score.bits_per_byte
        self._must_be_finite("validation loss", bits)
        self.losses |= {"perplexity": score.perplexity, "accuracy": score.accuracy}
        self.losses["validation_bits"] = bits
        entry = {
            "kind": "validation",
            "step": self.step,
            **score.to_dict(),
            "ratio_to_unigram": bits / self.levels[0] if self.levels[0] else None,
            "final": final,
            "elapsed_s": self.seconds(),
        }
        self._write(entry)
        return True

    def _save_is_due(self) -> bool:
        if self.plan.save_every is not None:
            return self.step % self.plan.save_every == 0
        return self.seconds() - self._last_save >= SAVE_EVERY_SECONDS

    def _save(self, final: bool = False, finished: bool = False) -> None:
        """Saves; on the way a failure is only a warning, since the run still holds everything."""
        self._last_save = self.seconds()
        run = {
            "settings": self.plan.settings(),
            "seconds": self.seconds(),
            "begin_seconds": self.begin_seconds,
            "losses": self.losses,
            "since_log": self._since_log(),
            "finished": finished,
            "unigram_bits": self.levels[0],
            "text_name": self.corpus.text.name,
        }
        if self.scaler is not None:
            run["scaler"] = self.scaler.state_dict()
        content = checkpoint.pack(
            self.model,
            self.plan.model_config.to_dict(),
            step=self.step,
            run=run,
            optimizer=self.optimizer,
            generators=generator_states(self.sampler, self.device, self.team),
            tokenizer=self.corpus.tokenizer,
            keep=self.team.is_first,
        )
        try:
            size = self.team.from_first(lambda: checkpoint.write(self.file, content))
        except (CheckpointError, PeerError) as error:
            if final:
                raise
            self.emit({"event": "warning", "message": f"{error} The run goes on."})
            return
        self.emit({"event": "saved", "step": self.step, "path": self.file, "bytes": size})

    def _draw(self) -> Path | None:
        if not self.config.plot or self.report is None:
            return None
        shape = self.plan.model_config
        title = (
            f"GPT, {self.parameters / 1e6:.2f} M parameters, on {self.corpus.text.name}\n"
            f"{shape.num_layers} layers x {shape.embed_dim}, context {shape.context}, "
            f"batch {self.plan.batch}, {self.step} steps in {self.seconds():.0f} s "
            f"on {self._device_name()}"
        )
        return self.report.draw(title, self.levels)

    def _write(self, entry: dict[str, Any], **more: Any) -> None:
        if self.report is not None:
            self.report.write(entry, **more)

    def seconds(self) -> float:
        """Of the run so far, those before a resume included."""
        return self.seconds_before + self._clock() - self._start

    def _progress(self) -> float:
        return self.plan.length.progress(self.step, self.seconds(), self.begin_seconds)

    def _expected_steps(self, step_seconds: float) -> int:
        return self.plan.length.expected_steps(self.step, self.seconds(), step_seconds)

    def _device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        count = torch.get_num_threads()
        return f"{self.device.type} ({count} thread{'s' if count > 1 else ''})"
