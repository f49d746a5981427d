"""``fused-lm train``: a text in, a trained model, its log and its curve out."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_lm.commands.arguments import number
from fused_lm.commands.errors import UserError, need_extra, one_sentence

if TYPE_CHECKING:
    from fused_lm.lm.gpt import GPTConfig
    from fused_lm.lm.train import TrainResult

NAME = "train"
HELP = "train a GPT on text: bytes in, a checkpoint, a log and a loss curve out"
RUNS = Path("runs")
INTERRUPTED = 130
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
    run.add_argument("--seed", type=number(int, 0), default=0)
    model = parser.add_argument_group("the model")
    model.add_argument("--layers", type=whole)
    model.add_argument("--width", type=whole)
    model.add_argument("--heads", type=whole)
    model.add_argument("--context", type=whole, help="bytes the model sees at once")
    model.add_argument("--dropout", type=float)
    model.add_argument("--positions", help="rotary, learned or sinusoidal (default: rotary)")
    model.add_argument("--activation", help="gelu, relu, swiglu ... (default: gelu)")
    model.add_argument("--norm", help="layer_norm or rms_norm (default: layer_norm)")
    training = parser.add_argument_group("training")
    training.add_argument("--batch", type=whole, help="windows per update")
    training.add_argument("--lr", type=number(float, 0.0, above=True), help="peak learning rate")
    training.add_argument("--warmup", type=number(int, 0), help="updates until the peak")
    training.add_argument("--log-every", type=whole, metavar="STEPS")
    training.add_argument("--eval-every", type=whole, metavar="STEPS")
    training.add_argument("--save-every", type=whole, metavar="STEPS", help="default: each minute")
    training.add_argument("--no-plot", action="store_true", help="draw no curve")


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
    from fused_lm.lm.data import DataError, load_text
    from fused_lm.lm.settings import TrainConfig, TrainError
    from fused_lm.lm.train import train

    with one_sentence(DataError, TrainError, CheckpointError):
        text = load_text(args.data)
        shape = {f: getattr(args, name) for name, f in _SHAPE_FIELDS.items()}
        fields = shape | {name: getattr(args, name) for name in _MODEL_FIELDS}
        fields = {name: value for name, value in fields.items() if value is not None}
        config = TrainConfig(
            out=args.out or RUNS / text.name,
            steps=args.steps,
            minutes=args.minutes,
            batch=args.batch,
            lr=args.lr,
            warmup=args.warmup,
            seed=args.seed,
            model_fields=fields,
            device=args.device,
            log_every=args.log_every,
            eval_every=args.eval_every,
            save_every=args.save_every,
            resume=args.resume,
            overwrite=args.overwrite,
            plot=not args.no_plot,
        )
        model_config = _fixed_model(fields) if not args.resume else None
        with make_display() as display, stop_on_interrupt(display.note) as should_stop:
            result = train(
                config,
                model_config,
                text,
                display.on_event,
                should_stop,
                started=started,
            )
    return _report(result)


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
    asked = False

    def on_interrupt(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        note("stopping after this step; press Ctrl-C again to stop at once")

    try:
        before = signal.signal(signal.SIGINT, on_interrupt)
    except ValueError:  # not the main thread: whoever called us handles Ctrl-C
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def _report(result: TrainResult) -> int:
    if result.interrupted:
        print(
            f"stopped at step {result.step}, nothing lost: {result.checkpoint} "
            "(go on with --resume)",
            file=sys.stderr,
        )
        return INTERRUPTED
    print(f"validation       {result.validation_bits:.3f} bits per byte")
    print(f"unigram entropy  {result.unigram_bits:.3f} bits per byte")
    if result.ratio is not None:
        print(f"ratio            {result.ratio:.3f}")
    print(f"checkpoint       {result.checkpoint}")
    print(f"log              {result.log}")
    if result.curve is not None:
        print(f"curve            {result.curve}")
    return 0
