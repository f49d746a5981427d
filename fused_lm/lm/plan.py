"""What a run will do, settled before its first step: device, model, batch, rates, length.

A new run takes what its settings name, and measures or derives the rest. A resumed run takes
everything from its checkpoint; only how long it goes on and how often it reports may change.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fused_lm.lm import checkpoint, runlog, sizing
from fused_lm.lm.checkpoint import Checkpoint, CheckpointError
from fused_lm.lm.data import BatchSampler, DataError, Text, split_text
from fused_lm.lm.gpt import GPT, GPTConfig
from fused_lm.lm.schedule import Length, default_warmup
from fused_lm.lm.step import make_optimizer, to_device, training_step

Emit = Callable[[dict[str, Any]], None]

DEFAULT_MINUTES = 5.0
EVALUATION_SHARE = 0.1
CLOSING_SECONDS = 7.0
"""Kept back from a timed run for what no clock here sees (Python and torch starting), the last save
and the curve."""


class TrainError(RuntimeError):
    """A run can't start or go on; the message is one sentence with what to do."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; None means: derive it.

    Attributes:
        out: Folder of the run.
        steps, minutes: Length, at most one of them; minutes count from the call, with everything.
        batch, lr, warmup: Windows per step, peak rate, steps of warm-up.
        model_fields: Fields of GPTConfig that every candidate of a sized run shall have.
        device: "auto", "cpu", "cuda", "cuda:1" ...
        log_every, eval_every, save_every: Steps; by default about 200 log lines, at most 20
            evaluations that take at most a tenth of the time, and a save a minute.
        eval_bytes, final_eval_bytes: Validation bytes per evaluation on the way and at the end.
        resume, overwrite: What to do with a run that is in ``out``; by default it is an error.
        plot: Whether to draw the curve at the end.
    """

    out: Path
    steps: int | None = None
    minutes: float | None = None
    batch: int | None = None
    lr: float | None = None
    warmup: int | None = None
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    seed: int = 0
    model_fields: dict[str, Any] = field(default_factory=dict)
    device: str = "auto"
    log_every: int | None = None
    eval_every: int | None = None
    save_every: int | None = None
    eval_bytes: int = 32768
    final_eval_bytes: int = 131072
    resume: bool = False
    overwrite: bool = False
    plot: bool = True


@dataclass(frozen=True)
class Plan:
    """A settled run; its settings go into the checkpoint and come back from it.

    ``minutes`` are the user's, ``seconds`` the part of them that is for steps; ``text`` is the
    fingerprint of the text; ``threads`` None leaves torch's number, so that a run of given steps
    repeats bit for bit; ``step_seconds`` is an estimate, 0 if there is none.
    """

    model_config: GPTConfig
    batch: int
    lr: float
    warmup: int
    weight_decay: float
    grad_clip: float
    seed: int
    text: str
    steps: int | None
    minutes: float | None
    seconds: float | None
    log_every: int
    eval_every: int
    save_every: int | None
    threads: int | None
    step_seconds: float

    @property
    def length(self) -> Length:
        return Length(steps=self.steps, seconds=self.seconds)

    def settings(self) -> dict[str, Any]:
        kept = asdict(self)
        del kept["model_config"], kept["step_seconds"]
        return kept


def pick_device(name: str) -> torch.device:
    """The device that ``name`` means here.

    Raises:
        TrainError: If it doesn't exist on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = "auto, cpu" + (", cuda" if torch.cuda.is_available() else "")
        raise TrainError(
            f"the device {name!r} can't be used here; expected one of {here}."
        ) from error
    return device


def open_folder(config: TrainConfig) -> Checkpoint | None:
    """Makes the run's folder and looks at what is in it.

    Returns:
        The checkpoint to resume from, or None for a new run.
    Raises:
        TrainError: If a run is there and the settings don't say what to do, or none is to resume,
            or the folder can't be written.
        CheckpointError: If the run there can't be read.
    """
    out = config.out
    held = [out / checkpoint.FILE_NAME, out / runlog.FILE_NAME]
    if config.resume:
        if not held[0].is_file():
            raise TrainError(
                f"{out} holds no checkpoint to resume; start the run without --resume."
            )
        found = checkpoint.read_checkpoint(held[0], training_state=True)
    else:
        found = None
        if any(path.exists() for path in held) and not config.overwrite:
            raise TrainError(
                f"{out} already holds a run; expected --resume to go on with it, "
                "--overwrite to replace it, or another folder with --out."
            )
    probe = out / ".writable.tmp"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        os.unlink(probe)
    except OSError as error:
        reason = error.strerror or error
        raise TrainError(
            f"{out} can't be written ({reason}); expected a writable folder."
        ) from error
    return found


def plan_new(
    config: TrainConfig,
    model_config: GPTConfig | None,
    text: Text,
    device: torch.device,
    clock: Callable[[], float],
    start: float,
    emit: Emit,
) -> Plan:
    """Settles a new run; a timed one measures training steps for it. ``start`` is on ``clock``."""
    rung = sizing.DEFAULT_RUNG
    if model_config is not None:
        rate = sizing.rung_for(model_config.embed_dim).lr
        rung = replace(rung, context=model_config.context, lr=rate)
    elif "context" in config.model_fields:
        rung = replace(rung, context=config.model_fields["context"])
    train, _ = split_text(text, rung.context)
    if config.steps is not None:
        if model_config is None:
            model_config = config_of(rung, config.model_fields)
        return _settle(config, model_config, text, rung, config.steps)
    budget = 60.0 * (DEFAULT_MINUTES if config.minutes is None else config.minutes)
    ladder = ladder_for(config, text) if model_config is None else (rung,)
    chosen = sizing.choose_rung(
        ladder,
        budget - CLOSING_SECONDS - (clock() - start),
        train.num_tokens,
        RungTimer(config, model_config, text, device, clock),
        clock,
        lambda measured: emit({"event": "measured", "measured": measured}),
    )
    if model_config is None:
        model_config = config_of(chosen.rung, config.model_fields)
        if "dropout" not in config.model_fields:
            dropout = sizing.suggested_dropout(chosen.epochs(train.num_tokens))
            model_config = replace(model_config, dropout=dropout)
    seconds = max(1.0, budget - closing_seconds(chosen, config.final_eval_bytes))
    left = seconds - (clock() - start)
    steps = max(1, int(left / chosen.cost.step_seconds))
    return _settle(config, model_config, text, chosen.rung, steps, seconds, chosen.cost)


def plan_resumed(config: TrainConfig, found: Checkpoint, text: Text) -> Plan:
    """Settles the rest of a run from its checkpoint.

    Raises:
        TrainError: If the text is another one, a setting of the model's would change, or the run
            is complete.
        CheckpointError: If the checkpoint's settings are not a run's.
    """
    try:
        kept = dict(found.run["settings"])
        model_config = GPTConfig.from_dict(found.config)
        seconds_before = float(found.run["seconds"])
        if config.steps is not None:
            kept |= {"steps": config.steps, "minutes": None, "seconds": None}
        elif config.minutes is not None:
            closing = (
                60.0 * kept["minutes"] - kept["seconds"] if kept["minutes"] else CLOSING_SECONDS
            )
            seconds = max(1.0, 60.0 * config.minutes - closing)
            kept |= {"steps": None, "minutes": config.minutes, "seconds": seconds}
        for name in ("log_every", "eval_every", "save_every"):
            asked = getattr(config, name)
            kept[name] = kept[name] if asked is None else asked
        step_seconds = seconds_before / max(1, found.step)
        plan = Plan(**kept, model_config=model_config, step_seconds=step_seconds)
        ended = plan.length.progress(found.step, seconds_before) >= 1.0
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{found.path} lacks the settings of its run ({error}); "
            "expected a checkpoint of fused-lm train to resume from."
        ) from error
    if plan.text != text.fingerprint():
        raise TrainError(
            f"{config.out} was trained on another text than {text.name}; "
            "resume it with the --data it began with, unchanged."
        )
    if ended:
        done = f"{found.step} steps" if plan.steps else f"{seconds_before / 60:.1f} minutes"
        raise TrainError(
            f"{config.out} is complete after {done}; give a larger --steps or --minutes to go on."
        )
    _refuse_changes(config, plan)
    return plan


def _refuse_changes(config: TrainConfig, plan: Plan) -> None:
    """A resumed run can't become another one."""
    fixed = plan.model_config.to_dict() | plan.settings()
    asked = dict(config.model_fields)
    asked |= {n: getattr(config, n) for n in ("batch", "lr", "warmup")}
    for name, value in asked.items():
        if value is not None and fixed.get(name) != value:
            raise TrainError(
                f"{config.out} was begun with {name} {fixed.get(name)}, which a resumed run keeps; "
                f"got {value}."
            )


def closing_seconds(chosen: sizing.Measured, eval_bytes: int) -> float:
    """Seconds after the last step; evaluating costs a third of training, forward only."""
    evaluation = eval_bytes / chosen.rung.tokens_per_step * chosen.cost.step_seconds / 3
    return CLOSING_SECONDS + evaluation


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


def ladder_for(config: TrainConfig, text: Text) -> tuple[sizing.Rung, ...]:
    """The ladder with the user's context and batch, as far as the text is long enough."""
    rungs: list[sizing.Rung] = []
    for rung in sizing.LADDER:
        rung = replace(
            rung,
            context=config.model_fields.get("context", rung.context),
            batch=config.batch or rung.batch,
        )
        try:
            split_text(text, rung.context)
        except DataError:
            if not rungs:
                raise
            break
        rungs.append(rung)
    return tuple(rungs)


class RungTimer:
    """Times training steps of rungs on real batches; on a CPU with the best number of threads.

    A larger model wants no fewer threads than a smaller one, so each rung is tried with at most
    twice the best number of the one before.
    """

    def __init__(
        self,
        config: TrainConfig,
        model_config: GPTConfig | None,
        text: Text,
        device: torch.device,
        clock: Callable[[], float],
    ) -> None:
        self.config, self.model_config, self.text = config, model_config, text
        self.device, self.clock = device, clock
        self._most_threads = torch.get_num_threads()

    def __call__(self, rung: sizing.Rung) -> sizing.Cost:
        config, device = self.config, self.device
        torch.manual_seed(config.seed)
        model = GPT(self.model_config or config_of(rung, config.model_fields)).to(device)
        optimizer = make_optimizer(model, 1e-4, config.weight_decay)
        train, _ = split_text(self.text, model.config.context)
        sampler = BatchSampler(train, config.batch or rung.batch, config.seed)

        def step() -> None:
            training_step(model, optimizer, *to_device(sampler.next(), device), config.grad_clip)
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


def _settle(
    config: TrainConfig,
    model_config: GPTConfig,
    text: Text,
    rung: sizing.Rung,
    steps: int,
    seconds: float | None = None,
    cost: sizing.Cost | None = None,
) -> Plan:
    """Fills in what follows from the number of steps, which is an estimate in a timed run."""
    minutes = None
    if seconds is not None:
        minutes = DEFAULT_MINUTES if config.minutes is None else config.minutes
    batch = config.batch or rung.batch
    # An evaluated byte costs a third of a trained one: forward only.
    eval_cost_steps = config.eval_bytes / (batch * model_config.context) / 3
    eval_every = max(1, steps // 20, round(eval_cost_steps / EVALUATION_SHARE))
    return Plan(
        model_config=model_config,
        batch=batch,
        lr=config.lr or rung.lr,
        warmup=default_warmup(steps) if config.warmup is None else config.warmup,
        weight_decay=config.weight_decay,
        grad_clip=config.grad_clip,
        seed=config.seed,
        text=text.fingerprint(),
        steps=config.steps,
        minutes=minutes,
        seconds=seconds,
        log_every=config.log_every or max(1, steps // 200),
        eval_every=config.eval_every or eval_every,
        save_every=config.save_every,
        threads=cost.threads if cost else None,
        step_seconds=cost.step_seconds if cost else 0.0,
    )
