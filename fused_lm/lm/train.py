"""Training a GPT on a text: one loop, everything it does reported as events.

    plan (plan.py, measure.py) -> step, step, ... -> final evaluation -> checkpoint -> curve

The loop owns no terminal and no signal: ``on_event`` receives dicts (see :func:`train`) and
``should_stop`` is asked after every step, so a program, a notebook and a test drive it alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fused_lm.lm import checkpoint, sizing
from fused_lm.lm.checkpoint import Checkpoint
from fused_lm.lm.corpus import Corpus, check_choice, open_corpus, with_tokenizer
from fused_lm.lm.gpt import GPTConfig
from fused_lm.lm.parallel import Team, join
from fused_lm.lm.plan import Plan, check_shares, plan_new, plan_resumed
from fused_lm.lm.report import import_tensorboard
from fused_lm.lm.restore import tokenizer_of
from fused_lm.lm.settings import Emit, TrainConfig, TrainError, claimed, open_folder, pick_device
from fused_lm.lm.text import Text, bigram_entropy, unigram_entropy
from fused_lm.lm.tokenizer import BYTES, AnyTokenizer, BPETokenizer, ByteTokenizer
from fused_lm.lm.trainer import Trainer


@dataclass(frozen=True)
class TrainResult:
    """What a run came to; the same in every process.

    Attributes:
        step: Updates taken, those before a resume included.
        interrupted: Whether ``should_stop`` ended it early; then there is no final evaluation.
        validation_bits: Bits per byte of the last evaluation, or None.
        perplexity, accuracy: Of the next token, in that evaluation, or None.
        unigram_bits: Entropy of the text's single bytes, in bits.
        parameters: Of the model.
        seconds: Of the run so far, those before a resume included.
        checkpoint, log: Files.
        curve: PNG, or None if it wasn't drawn.
    """

    step: int
    interrupted: bool
    validation_bits: float | None
    perplexity: float | None
    accuracy: float | None
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
    """Trains a model on a text, or goes on with a run; under ``torchrun``, in all its processes.

    Args:
        config: Settings.
        model_config: The model; None takes the default shape, or in a timed run the largest that
            the machine can train in the time. A resumed run takes its own, and the vocabulary is
            always the tokenizer's.
        text: What to learn.
        on_event: Called, in the first process only, with dicts whose "event" is one of: text,
            measured, begin, step, train, validation, saved, warning, end. "begin", "train" and
            "validation" are also the lines of the log.
        should_stop: True, in any process, ends the run after the step at hand, with a checkpoint.
        clock: Seconds; only differences count.
        started: When the user began to wait, by that clock; default: now.
    Raises:
        DataError, TrainError, CheckpointError: In one sentence.
        PeerError: In all processes but the first, when the first raised one of these.
        ImportError: Without a package that the settings need.
    """
    start = clock() if started is None else started
    if config.steps is not None and config.minutes is not None:
        raise TrainError("a run's length is either --steps or --minutes; got both.")
    device = pick_device(config.device)
    with join(config.parallel, device) as team, claimed(config.out, team):
        emit: Emit = on_event if on_event is not None and team.is_first else lambda event: None
        return _train_in(team, config, model_config, text, device, emit, should_stop, clock, start)


def _train_in(
    team: Team,
    config: TrainConfig,
    model_config: GPTConfig | None,
    text: Text,
    device: torch.device,
    emit: Emit,
    should_stop: Callable[[], bool] | None,
    clock: Callable[[], float],
    start: float,
) -> TrainResult:
    """The run of one process; when it returns, nothing of the run is left in memory."""
    threads = torch.get_num_threads()
    prepared = team.from_first(
        lambda: _prepare(config, model_config, text, device, clock, start, emit, team)
    )
    found = None
    if prepared.resumed:
        found = checkpoint.read_checkpoint(config.out, training_state=True)
    corpus = prepared.corpus(text)
    trainer = Trainer(
        config, prepared.plan, corpus, prepared.levels, device, emit, should_stop, team, found
    )
    if found is None and team.is_first:  # only now does a run stand that can replace the old one
        trainer.file.unlink(missing_ok=True)
    found = None  # its tensors are as large as the model's
    try:
        interrupted, curve = trainer.run(clock, start)
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = str(error).strip().split("\n")[0]
        raise TrainError(
            f"torch.compile failed here ({reason}); train without --compile."
        ) from error
    finally:
        torch.set_num_threads(threads)
    result = _result(trainer, prepared.levels[0], interrupted, curve)
    emit({"event": "end", "result": result})
    return result


@dataclass(frozen=True)
class _Prepared:
    """What the first process settled, in a form that can be sent to the others.

    ``tokenizer`` is a BPE tokenizer's document, or None for bytes.
    """

    plan: Plan
    resumed: bool
    tokenizer: str | None
    levels: tuple[float, float]

    def corpus(self, text: Text) -> Corpus:
        tokenizer: AnyTokenizer = ByteTokenizer()
        if self.tokenizer is not None:
            tokenizer = BPETokenizer(self.tokenizer)
        return with_tokenizer(text, tokenizer, context=self.plan.model_config.context)


def _prepare(
    config: TrainConfig,
    model_config: GPTConfig | None,
    text: Text,
    device: torch.device,
    clock: Callable[[], float],
    start: float,
    emit: Emit,
    team: Team,
) -> _Prepared:
    """All that comes before the first step and is done once: folder, tokens, plan."""
    if config.tensorboard:
        import_tensorboard()  # seconds, so before a timed run is measured
    found = open_folder(config)
    levels = unigram_entropy(text.data), bigram_entropy(text.data)
    emit({"event": "text", "text": text, "unigram_bits": levels[0], "bigram_bits": levels[1]})
    if found is not None:
        plan = plan_resumed(config, found, text)
        document = _stored_tokenizer(found)
    else:
        check_choice(config.tokenizer or BYTES, config.vocab_size)
        corpus = _new_corpus(config, model_config, text, emit)
        document = getattr(corpus.tokenizer, "document", None)
        if document is not None:
            size = corpus.tokenizer.vocab_size
            config = replace(config, model_fields=config.model_fields | {"vocab_size": size})
            model_config = replace(model_config, vocab_size=size) if model_config else None
        plan = plan_new(config, model_config, corpus, device, clock, start, emit, team.size)
    check_shares(plan, team.size)
    prepared = _Prepared(plan, found is not None, document, levels)
    prepared.corpus(text)  # so that the other processes find the tokens made
    return prepared


def _new_corpus(
    config: TrainConfig, model_config: GPTConfig | None, text: Text, emit: Emit
) -> Corpus:
    if model_config is not None:
        context = model_config.context
    else:
        context = config.model_fields.get("context", sizing.DEFAULT_RUNG.context)
    return open_corpus(
        text,
        config.tokenizer or BYTES,
        config.vocab_size,
        context=context,
        note=lambda message: emit({"event": "warning", "message": message}),
    )


def _stored_tokenizer(found: Checkpoint) -> str | None:
    return getattr(tokenizer_of(found), "document", None)


def _result(
    trainer: Trainer, unigram_bits: float, interrupted: bool, curve: Path | None
) -> TrainResult:
    return TrainResult(
        step=trainer.step,
        interrupted=interrupted,
        validation_bits=trainer.losses.get("validation_bits"),
        perplexity=trainer.losses.get("perplexity"),
        accuracy=trainer.losses.get("accuracy"),
        unigram_bits=unigram_bits,
        parameters=trainer.parameters,
        seconds=trainer.seconds(),
        checkpoint=trainer.file,
        log=trainer.log_path,
        curve=curve,
    )
