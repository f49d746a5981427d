"""What a run will do, settled before its first step: device, model, batch, rates, length.

A new run takes what its settings name, and measures or derives the rest. A resumed run takes
everything from its checkpoint; only how long it goes on, how often it reports and on how many
processes it runs may change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fused_lm.lm import sizing
from fused_lm.lm.checkpoint import Checkpoint, CheckpointError
from fused_lm.lm.corpus import Corpus
from fused_lm.lm.gpt import GPTConfig
from fused_lm.lm.measure import DEFAULT_GRAD_CLIP, RungTimer, config_of, ladder_for
from fused_lm.lm.precision import pick_precision
from fused_lm.lm.schedule import Length, default_warmup
from fused_lm.lm.settings import Emit, TrainConfig, TrainError
from fused_lm.lm.text import Text
from fused_lm.lm.tokenizer import BPE, DEFAULT_VOCAB_SIZE

DEFAULT_MINUTES = 5.0
EVALUATION_SHARE = 0.1
CLOSING_SECONDS = 7.0
"""Kept back from a timed run for what no clock here sees (Python and torch starting), the last save
and the curve."""

_FIXED = (
    *("batch", "lr", "warmup", "grad_clip", "accumulate", "precision", "compile"),
    *("tokenizer", "vocab_size"),
)
"""Settings that a resumed run keeps, besides the model's."""


@dataclass(frozen=True)
class Plan:
    """A settled run; its settings go into the checkpoint and come back from it.

    The fields with a default were added later: a checkpoint without them was made with these.
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
    tokenizer: str = "bytes"
    vocab_size: int | None = None
    accumulate: int = 1
    precision: str = "auto"
    compile: bool = False

    @property
    def length(self) -> Length:
        return Length(steps=self.steps, seconds=self.seconds)

    def settings(self) -> dict[str, Any]:
        kept = asdict(self)
        del kept["model_config"], kept["step_seconds"]
        return kept


def plan_new(
    config: TrainConfig,
    model_config: GPTConfig | None,
    corpus: Corpus,
    device: torch.device,
    clock: Callable[[], float],
    start: float,
    emit: Emit,
    processes: int = 1,
) -> Plan:
    """Settles a new run; a timed one measures training steps for it. ``start`` is on ``clock``."""
    precision = pick_precision(config.precision or "auto", device)
    config = replace(config, precision=precision.name)
    rung = sizing.DEFAULT_RUNG
    if model_config is not None:
        rate = sizing.rung_for(model_config.embed_dim).lr
        rung = replace(rung, context=model_config.context, lr=rate)
    elif "context" in config.model_fields:
        rung = replace(rung, context=config.model_fields["context"])
    train, _ = corpus.split(rung.context)
    if config.steps is not None:
        if model_config is None:
            model_config = config_of(rung, config.model_fields)
        return _settle(config, model_config, corpus.text, rung, config.steps)
    budget = 60.0 * (DEFAULT_MINUTES if config.minutes is None else config.minutes)
    ladder = ladder_for(config, corpus) if model_config is None else (rung,)
    chosen = sizing.choose_rung(
        ladder,
        budget - CLOSING_SECONDS - (clock() - start),
        train.num_tokens,
        RungTimer(config, model_config, corpus, device, precision, clock, processes),
        clock,
        lambda measured: emit({"event": "measured", "measured": measured}),
    )
    if model_config is None:
        model_config = config_of(chosen.rung, config.model_fields)
        if "dropout" not in config.model_fields:
            dropout = sizing.suggested_dropout(chosen.epochs(train.num_tokens))
            model_config = replace(model_config, dropout=dropout)
    seconds = max(1.0, budget - closing_seconds(chosen, config.final_eval_tokens))
    left = seconds - (clock() - start)
    steps = max(1, int(left / chosen.cost.step_seconds))
    text = corpus.text
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
    if ended and is_finished(found):
        done = f"{found.step} steps" if plan.steps else f"{seconds_before / 60:.1f} minutes"
        raise TrainError(
            f"{config.out} is complete after {done}; give a larger --steps or --minutes to go on."
        )
    _refuse_changes(config, plan)
    return plan


def is_finished(found: Checkpoint) -> bool:
    """Whether a run had got through its final evaluation when it was saved.

    Early checkpoints don't say; those at the end of a run nearly always had.
    """
    return bool(found.run.get("finished", True))


def check_shares(plan: Plan, processes: int) -> None:
    """Refuses a batch that can't be dealt out evenly.

    Raises:
        TrainError: In one sentence.
    """
    parts = processes * plan.accumulate
    if plan.batch % parts:
        who = f"{processes} processes" if processes > 1 else "one process"
        raise TrainError(
            f"a batch of {plan.batch} windows can't be dealt out evenly to {who} in "
            f"{plan.accumulate} parts each; give a --batch that {parts} divides."
        )


def _refuse_changes(config: TrainConfig, plan: Plan) -> None:
    """A resumed run can't become another one."""
    fixed = plan.model_config.to_dict() | plan.settings()
    asked = dict(config.model_fields)
    asked |= {name: getattr(config, name) for name in _FIXED}
    if asked["precision"] == "auto":
        asked["precision"] = None
    for name, value in asked.items():
        if value is not None and fixed.get(name) != value:
            raise TrainError(
                f"{config.out} was begun with {name} {fixed.get(name)}, which a resumed run keeps; "
                f"got {value}."
            )


def closing_seconds(chosen: sizing.Measured, eval_tokens: int) -> float:
    """Seconds after the last step; evaluating costs a third of training, forward only."""
    evaluation = eval_tokens / chosen.rung.tokens_per_step * chosen.cost.step_seconds / 3
    return CLOSING_SECONDS + evaluation


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
    vocab_size = config.vocab_size
    if config.tokenizer == BPE and vocab_size is None:
        vocab_size = DEFAULT_VOCAB_SIZE
    batch = config.batch or rung.batch
    # An evaluated token costs a third of a trained one: forward only.
    eval_cost_steps = config.eval_tokens / (batch * model_config.context) / 3
    eval_every = max(1, steps // 20, round(eval_cost_steps / EVALUATION_SHARE))
    return Plan(
        model_config=model_config,
        batch=batch,
        lr=config.lr or rung.lr,
        warmup=default_warmup(steps) if config.warmup is None else config.warmup,
        weight_decay=config.weight_decay,
        grad_clip=config.grad_clip or DEFAULT_GRAD_CLIP,
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
        tokenizer=config.tokenizer or "bytes",
        vocab_size=vocab_size,
        accumulate=config.accumulate or 1,
        precision=config.precision or "auto",
        compile=bool(config.compile),
    )
