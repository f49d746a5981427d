"""``fused-lm train``: a text in, a trained model, its log and its curve out."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_lm.commands.arguments import number
from fused_lm.commands.errors import UserError, is_first_process, need_extra, one_sentence

if TYPE_CHECKING:
    from fused_lm.lm.gpt import GPTConfig
    from fused_lm.lm.settings import TrainConfig
    from fused_lm.lm.train import TrainResult

NAME = "train"
HELP = "train a GPT on text: a checkpoint, a log and a loss curve come out"
RUNS = Path("runs")
INTERRUPTED = 130
PEER_FAILED = 2
_SAME_CTRL_C_SECONDS = 5.0
"""torchrun passes on a Ctrl-C that the terminal has already sent to every process."""

_SHAPE_FIELDS = {"layers": "num_layers", "width": "embed_dim", "heads": "num_heads"}
_MODEL_FIELDS = ("context", "dropout", "positions", "activation", "norm")
_HEAD_DIM = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    whole = number(int, 1)
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--data",
        metavar="PATH",
        help="a text file or a folder of them; default: the source of Python's standard library",
    )
    run.add_argument(
        "--tokenizer", help="bytes, or bpe: tokens learned from the text (default: bytes)"
    )
    run.add_argument(
        "--vocab-size",
        type=number(int, 1, most=2**31 - 1),
        metavar="V",
        help="of bpe (default: 4096)",
    )
    run.add_argument("--out", metavar="DIR", type=Path, help="default: runs/<name of the text>")
    length = run.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes",
        type=number(float, 0.05),
        help="time in all; the model's size is chosen to fit, unless given (default: 5)",
    )
    length.add_argument("--steps", type=whole, help="number of updates, instead of a time")
    run.add_argument("--resume", action="store_true", help="go on with the run in --out")
    run.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    run.add_argument(
        "--parallel",
        default="auto",
        help="under torchrun: ddp, or fsdp, which shares out the model too (default: auto)",
    )
    run.add_argument("--seed", type=number(int, 0), default=0)
    model = parser.add_argument_group("the model")
    model.add_argument("--layers", type=whole)
    model.add_argument("--width", type=whole)
    model.add_argument("--heads", type=whole)
    model.add_argument("--context", type=whole, help="tokens the model sees at once")
    model.add_argument("--dropout", type=float)
    model.add_argument("--positions", help="rotary, learned or sinusoidal (default: rotary)")
    model.add_argument("--activation", help="gelu, relu, swiglu ... (default: gelu)")
    model.add_argument("--norm", help="layer_norm or rms_norm (default: layer_norm)")
    _add_training_arguments(parser, whole)


def _add_training_arguments(parser: argparse.ArgumentParser, whole: Callable[[str], Any]) -> None:
    training = parser.add_argument_group("training")
    training.add_argument("--batch", type=whole, help="windows per update")
    training.add_argument(
        "--accumulate",
        type=whole,
        metavar="PARTS",
        help="read each batch in so many parts: the same update in less memory",
    )
    training.add_argument("--lr", type=number(float, 0.0, above=True), help="peak learning rate")
    training.add_argument("--warmup", type=number(int, 0), help="updates until the peak")
    training.add_argument(
        "--clip",
        type=number(float, 0.0, above=True),
        metavar="NORM",
        help="largest norm of a gradient (default: 1)",
    )
    training.add_argument(
        "--precision", help="fp32, bf16, fp16 or auto: bf16 on a GPU, else fp32 (default: auto)"
    )
    training.add_argument("--compile", action="store_true", help="fuse each block by torch.compile")
    training.add_argument("--log-every", type=whole, metavar="STEPS")
    training.add_argument("--eval-every", type=whole, metavar="STEPS")
    training.add_argument("--save-every", type=whole, metavar="STEPS", help="default: each minute")
    training.add_argument("--no-plot", action="store_true", help="draw no curve")
    training.add_argument(
        "--tensorboard", action="store_true", help="write the log for TensorBoard too"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command. Returns the exit code.

    Raises:
        UserError: In one sentence, on anything the user can mend.
    """
    started = time.perf_counter()
    if args.resume and args.overwrite:
        raise UserError(
            "a run is either resumed or overwritten; got both --resume and --overwrite."
        )
    try:
        import safetensors  # noqa: F401 - fail before training, not at the first save

        from fused_lm.commands.progress import make_display
    except ImportError as error:
        raise need_extra(error) from error
    from fused_lm.lm.checkpoint import CheckpointError
    from fused_lm.lm.parallel import PeerError
    from fused_lm.lm.settings import TrainError
    from fused_lm.lm.text import DataError, load_text
    from fused_lm.lm.train import train

    with one_sentence(DataError, TrainError, CheckpointError):
        text = load_text(args.data)
        fields = _model_fields(args)
        config = _settings(args, text.name, fields)
        model_config = _fixed_model(fields) if not args.resume else None
        try:
            with make_display() as display, stop_on_interrupt(display.note) as should_stop:
                result = train(
                    config,
                    model_config,
                    text,
                    display.on_event,
                    should_stop,
                    started=started,
                )
        except PeerError:
            return PEER_FAILED
    return _report(result) if is_first_process() else _exit_code(result)


def _model_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of the model's configuration that the options name."""
    fields = {field: getattr(args, name) for name, field in _SHAPE_FIELDS.items()}
    fields |= {name: getattr(args, name) for name in _MODEL_FIELDS}
    return {name: value for name, value in fields.items() if value is not None}


def _settings(args: argparse.Namespace, text_name: str, fields: dict[str, Any]) -> TrainConfig:
    from fused_lm.lm.settings import TrainConfig

    same = (
        *("steps", "minutes", "tokenizer", "vocab_size", "batch", "lr", "warmup", "accumulate"),
        *("precision", "parallel", "seed", "device", "log_every", "eval_every", "save_every"),
        *("resume", "overwrite", "tensorboard"),
    )
    return TrainConfig(
        out=args.out or RUNS / text_name,
        model_fields=fields,
        compile=args.compile or None,
        plot=not args.no_plot,
        grad_clip=args.clip,
        **{name: getattr(args, name) for name in same},
    )


def _fixed_model(fields: dict[str, Any]) -> GPTConfig | None:
    """The model that the options fix, or None if its size is free."""
    from fused_lm.lm.measure import config_of
    from fused_lm.lm.sizing import DEFAULT_RUNG

    if not any(name in fields for name in _SHAPE_FIELDS.values()):
        return None
    fields = dict(fields)
    if "embed_dim" in fields and "num_heads" not in fields:
        fields["num_heads"] = max(1, fields["embed_dim"] // _HEAD_DIM)
    return config_of(DEFAULT_RUNG, fields)


@contextmanager
def stop_on_interrupt(note: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Makes the first Ctrl-C a wish to stop after the step at hand; a second one stops at once."""
    asked: float | None = None

    def on_interrupt(number: int, frame: Any) -> None:
        nonlocal asked
        now = time.monotonic()
        if asked is None:
            asked = now
            if is_first_process():
                note("stopping after this step; press Ctrl-C again to stop at once")
        elif "RANK" not in os.environ or now - asked > _SAME_CTRL_C_SECONDS:
            raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGINT, on_interrupt)
    except ValueError:  # not the main thread: whoever called us handles Ctrl-C
        yield lambda: False
        return
    try:
        yield lambda: asked is not None
    finally:
        signal.signal(signal.SIGINT, before)


def _exit_code(result: TrainResult) -> int:
    return INTERRUPTED if result.interrupted else 0


def _report(result: TrainResult) -> int:
    if result.interrupted:
        print(
            f"stopped at step {result.step}, nothing lost: {result.checkpoint} "
            "(go on with --resume)",
            file=sys.stderr,
        )
        return _exit_code(result)
    print(f"validation       {result.validation_bits:.3f} bits per byte")
    print(f"unigram entropy  {result.unigram_bits:.3f} bits per byte")
    if result.ratio is not None:
        print(f"ratio            {result.ratio:.3f}")
    if result.perplexity is not None and result.accuracy is not None:
        print(f"next token       perplexity {result.perplexity:.2f}, ", end="")
        print(f"{100 * result.accuracy:.1f} % right")
    print(f"checkpoint       {result.checkpoint}")
    print(f"log              {result.log}")
    if result.curve is not None:
        print(f"curve            {result.curve}")
    return _exit_code(result)
