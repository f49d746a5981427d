"""From a checkpoint back to what was saved: model, tokenizer, optimizer."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from fused_lm.lm.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from fused_lm.lm.gpt import GPT, GPTConfig
from fused_lm.lm.sharded import share_like
from fused_lm.lm.tokenizer import AnyTokenizer, BPETokenizer, ByteTokenizer


def load_model(path: str | os.PathLike[str] | Checkpoint) -> tuple[GPT, Checkpoint]:
    """Builds the model that a checkpoint describes, on the CPU, with its weights.

    Raises:
        CheckpointError: As :func:`read_checkpoint`, or if the configuration can't be built.
    """
    checkpoint = path if isinstance(path, Checkpoint) else read_checkpoint(path)
    try:
        model = GPT(GPTConfig.from_dict(checkpoint.config))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint.path} describes a model that can't be built ({error}); "
            "expected a configuration written by this version."
        ) from error
    load_weights(model, checkpoint)
    return model, checkpoint


def tokenizer_of(checkpoint: Checkpoint) -> AnyTokenizer:
    """The tokenizer that the model was trained with.

    Raises:
        CheckpointError: If the stored one is none, or not of the model's vocabulary.
        ImportError: Without the ``tokenizers`` package, where it is needed.
    """
    if checkpoint.tokenizer is None:
        return ByteTokenizer()
    try:
        tokenizer = BPETokenizer(checkpoint.tokenizer)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path} can't be used: {error}.") from error
    if tokenizer.vocab_size != checkpoint.config.get("vocab_size"):
        raise CheckpointError(
            f"{checkpoint.path} has a tokenizer of {tokenizer.vocab_size} tokens and a model of "
            f"{checkpoint.config.get('vocab_size')}; expected the same number."
        )
    return tokenizer


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copies the weights into ``model``.

    Raises:
        CheckpointError: If names or shapes differ from the model's.
    """
    expected = model.state_dict()
    missing = sorted(expected.keys() - checkpoint.weights.keys())
    foreign = sorted(checkpoint.weights.keys() - expected.keys())
    if missing or foreign:
        which = f"lacks {missing[0]}" if missing else f"has an unknown {foreign[0]}"
        raise CheckpointError(
            f"{checkpoint.path} {which}; "
            f"expected the {len(expected)} tensors of its own configuration."
        )
    for name, tensor in expected.items():
        got = checkpoint.weights[name]
        if got.shape != tensor.shape:
            raise CheckpointError(
                f"{checkpoint.path} holds {name} as {list(got.shape)}; "
                f"its own configuration expects {list(tensor.shape)}."
            )
    model.load_state_dict(checkpoint.weights)


def load_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, checkpoint: Checkpoint
) -> None:
    """Puts the stored state back; the optimizer's groups and hyperparameters stay its own.

    Raises:
        CheckpointError: If a parameter has no state, or one of another shape.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, tensor in checkpoint.optimizer.items():
        state_name, _, name = key.partition("/")
        by_name.setdefault(name, {})[state_name] = tensor
    state = {}
    order = [p for group in optimizer.param_groups for p in group["params"]]
    for index, parameter in enumerate(order):
        found = by_name.get(names[parameter], {})
        shapes = {key: tensor.shape for key, tensor in found.items()}
        if shapes != {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}:
            raise CheckpointError(
                f"{checkpoint.path} has no optimizer state that fits {names[parameter]}; "
                "expected a checkpoint of fused-lm train to resume from."
            )
        state[index] = {key: share_like(tensor, parameter) for key, tensor in found.items()}
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
