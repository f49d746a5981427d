"""``fused-lm eval``: what a trained model knows of a text."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fused_lm.commands.arguments import number
from fused_lm.commands.errors import need_extra, one_sentence

if TYPE_CHECKING:
    from fused_lm.lm.data import Windows
    from fused_lm.lm.metrics import Score

NAME = "eval"
HELP = "score a trained model: loss, perplexity, bits per byte, next-token accuracy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="folder of a run, or its checkpoint file"
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="a text file or a folder of them; default: the source of Python's standard library; "
        "of the text that the model was trained on, the held-out part is scored, of another all",
    )
    parser.add_argument(
        "--tokens",
        type=number(int, 1),
        default=1_000_000,
        help="how many to score, spread evenly over the text (default: 1000000)",
    )
    parser.add_argument(
        "--batch", type=number(int, 1), default=16, help="windows at a time (default: 16)"
    )
    parser.add_argument(
        "--precision", default="auto", help="fp32, bf16, fp16 or auto (default: auto)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command. Returns the exit code.

    Raises:
        UserError: In one sentence, on anything the user can mend.
    """
    try:
        import safetensors  # noqa: F401 - named before anything else fails
    except ImportError as error:
        raise need_extra(error) from error
    from fused_lm.lm.checkpoint import CheckpointError
    from fused_lm.lm.corpus import with_tokenizer
    from fused_lm.lm.metrics import evaluate
    from fused_lm.lm.precision import pick_precision
    from fused_lm.lm.restore import load_model, tokenizer_of
    from fused_lm.lm.settings import TrainError, pick_device
    from fused_lm.lm.step import LossModule
    from fused_lm.lm.text import DataError, load_text

    with one_sentence(CheckpointError, DataError, TrainError):
        device = pick_device(args.device)
        precision = pick_precision(args.precision, device)
        model, checkpoint = load_model(args.checkpoint)
        tokenizer = tokenizer_of(checkpoint)
        text = load_text(args.data)
        context = checkpoint.config["context"]
        corpus = with_tokenizer(text, tokenizer, context=context)
        known = checkpoint.run.get("settings", {}).get("text") == text.fingerprint()
        windows: Windows = corpus.split(context)[1] if known else corpus.whole(context)
        root = LossModule(model.to(device))
        lengths = tokenizer.byte_lengths()
        score = evaluate(root, windows, args.tokens, args.batch, precision, lengths)
    assert score is not None, "nobody asked it to stop"
    part = "held out from training" if known else "all of it; the model was trained on another text"
    print(f"text           {text.name}, {part}")
    print(f"model          step {checkpoint.step}, {tokenizer.kind}, {tokenizer.vocab_size} tokens")
    _report(score)
    return 0


def _report(score: Score) -> None:
    print(f"scored         {score.tokens} tokens, {score.bytes} bytes")
    print(f"loss           {score.loss:.4f} nats per token")
    print(f"perplexity     {score.perplexity:.3f}")
    print(f"bits per byte  {score.bits_per_byte:.4f}")
    print(f"accuracy       {100 * score.accuracy:.2f} % of next tokens")
