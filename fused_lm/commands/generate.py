"""``fused-lm generate``: text from a checkpoint."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fused_lm.commands.arguments import number
from fused_lm.commands.errors import UserError, need_extra, one_sentence

if TYPE_CHECKING:
    from fused_lm.lm.tokenizer import AnyTokenizer

NAME = "generate"
HELP = "write text with a trained model"
_ONE_THREAD_BELOW = 10_000_000
"""Parameters; one token through less than this is over before a second thread is awake."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="folder of a run, or its checkpoint file",
    )
    parser.add_argument("--prompt", default="", help="text to continue (default: a new line)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--bytes", type=number(int, 1), default=600, help="how many to write (default: 600)"
    )
    length.add_argument("--tokens", type=number(int, 1), help="how many to write, instead of bytes")
    parser.add_argument(
        "--temperature",
        type=number(float, 0.0),
        default=0.8,
        help="0 always takes the likeliest token, 1 samples as the model believes (default: 0.8)",
    )
    parser.add_argument(
        "--top-k", type=number(int, 1), metavar="K", help="only the K likeliest tokens"
    )
    parser.add_argument(
        "--top-p",
        type=number(float, 0.0, above=True),
        metavar="P",
        help="only the fewest tokens that together have this probability",
    )
    parser.add_argument("--seed", type=number(int, 0), default=0)
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)"
    )
    parser.add_argument(
        "--check-python",
        action="store_true",
        help="also print how many of the lines Python's tokenizer accepts",
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
    from fused_lm.lm.restore import load_model, tokenizer_of
    from fused_lm.lm.settings import TrainError, pick_device

    if args.top_p is not None and args.top_p > 1:
        raise UserError(f"--top-p is a probability; expected at most 1, got {args.top_p:g}.")
    with one_sentence(CheckpointError, TrainError):
        device = pick_device(args.device)
        model, checkpoint = load_model(args.checkpoint)
        tokenizer = tokenizer_of(checkpoint)
    # What the shell could not decode comes back as the bytes that were typed.
    prompt = args.prompt.encode("utf-8", "surrogateescape") or b"\n"
    content = sample(model.to(device), tokenizer, prompt, args)
    shown = content if args.prompt else content[len(prompt) :]
    print(shown.decode("utf-8", "replace"))
    if args.check_python:
        from fused_lm.lm.pycheck import count_tokenizable

        good, total = count_tokenizable(content, begin=len(prompt))
        share = f" ({100 * good / total:.0f} %)" if total else ""
        print(f"tokenize accepts {good} of {total} sampled non-blank lines{share}")
    return 0


def sample(model: Any, tokenizer: AnyTokenizer, prompt: bytes, args: argparse.Namespace) -> bytes:
    """The prompt and its continuation by ``args.bytes`` bytes or ``args.tokens`` tokens."""
    import torch

    from fused_lm.lm.generate import generate

    device = next(model.parameters()).device
    if device.type == "cpu" and sum(p.numel() for p in model.parameters()) < _ONE_THREAD_BELOW:
        torch.set_num_threads(1)
    generator = torch.Generator(device).manual_seed(args.seed)
    tokens = torch.from_numpy(tokenizer.encode(prompt))[None].to(device)
    written = 0

    def long_enough(token: torch.Tensor) -> bool:
        nonlocal written
        written += len(tokenizer.decode([int(token)]))
        return args.tokens is None and written >= args.bytes

    try:
        found = generate(
            model,
            tokens,
            args.tokens or args.bytes,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            generator=generator,
            stop=long_enough,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    content = tokenizer.decode(found[0].tolist())
    return content if args.tokens else content[: len(prompt) + args.bytes]
