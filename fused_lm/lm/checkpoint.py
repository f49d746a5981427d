"""Checkpoints: one safetensors file that holds all of a run, written whole or not at all.

    model/<parameter or buffer>         the weights; a tied weight is stored once
    optimizer/<state>/<parameter>       AdamW's moments and step counts
    generator/<name>                    states of the random generators, uint8
    tokenizer/bpe                       its document as UTF-8, uint8; absent where tokens are bytes

and in the header, as strings: ``format``, ``format_version``, and ``fused_lm``, a JSON document
with the model's configuration, the step, the settings and progress of the run, the names that share
a stored tensor, and a CRC-32 per tensor (safetensors itself doesn't notice a flipped bit).

Weights and training state share a file so that a crash can't leave a new one beside an old one. It
is written under another name in the same folder, synced, and then renamed over the old: at every
instant the name shows a whole checkpoint. No pickle is ever written or loaded, because loading one
runs its code. What several processes share out is put together first: the file of two processes is
that of one.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_lm.lm.atomic import write_atomically
from fused_lm.lm.sharded import is_shared, whole
from fused_lm.lm.tokenizer import BPE, KINDS, AnyTokenizer, BPETokenizer, ByteTokenizer

FILE_NAME = "checkpoint.safetensors"
FORMAT = "fused_lm.checkpoint"
FORMAT_VERSION = 1

_TOKENIZER = "tokenizer/bpe"
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")  # torch.save's zip, and a bare pickle of protocol >= 2


class CheckpointError(RuntimeError):
    """A checkpoint can't be read or written; the message is one sentence with what was expected."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory, on the CPU.

    Attributes:
        path: The file.
        config: Fields of the model's configuration.
        step: Optimizer steps taken.
        run: Settings and progress of the run, as the trainer wrote them.
        weights: State dict of the model, tied names included.
        optimizer: "<state>/<parameter>" -> tensor; empty if not asked for.
        generators: Name -> uint8 state; empty if not asked for.
        tokenizer: Document of the BPE tokenizer, or None where tokens are bytes.
    """

    path: Path
    config: dict[str, Any]
    step: int
    run: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    generators: dict[str, Tensor]
    tokenizer: str | None = None


def checkpoint_file(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that ``path`` means: itself, or the one in that folder."""
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path


def save_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, config: Mapping[str, Any], **more: Any
) -> int:
    """Writes a checkpoint atomically over whatever ``path`` (a file) held.

    Args:
        model, config, more: See :func:`pack`.
    Returns:
        Bytes written.
    Raises:
        CheckpointError: If it can't be written; what ``path`` held before is untouched then.
    """
    return write(path, pack(model, config, **more))


def pack(
    model: nn.Module,
    config: Mapping[str, Any],
    *,
    step: int,
    run: Mapping[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
    generators: Mapping[str, Tensor] | None = None,
    tokenizer: AnyTokenizer | None = None,
    keep: bool = True,
) -> bytes:
    """A checkpoint as the content of its file.

    Where weights are shared out over processes, all of them must call it.

    Args:
        model, optimizer: Whose state it holds.
        config, step, run, generators: See :class:`Checkpoint`.
        tokenizer: Default: bytes.
        keep: False in a process that only gives its share; it gets b"".
    """
    from safetensors.torch import save

    weights, tied = _stored_once(model.state_dict())
    shared = {f"model/{name}": tensor for name, tensor in weights.items()}
    if optimizer is not None:
        shared |= {f"optimizer/{n}": t for n, t in optimizer_tensors(optimizer, model).items()}
    tensors = {}
    for name, tensor in shared.items():
        tensor = whole(tensor)
        if keep:
            tensors[name] = tensor.detach().to("cpu").contiguous()
    if not keep:
        return b""
    tensors |= {f"generator/{name}": state for name, state in (generators or {}).items()}
    if isinstance(tokenizer, BPETokenizer):
        content = bytearray(tokenizer.document.encode())
        tensors[_TOKENIZER] = torch.frombuffer(content, dtype=torch.uint8)
    document = {
        "config": dict(config),
        "step": step,
        "vocabulary": (tokenizer or ByteTokenizer()).kind,
        "run": dict(run),
        "tied": tied,
        "crc32": {name: _crc32(tensor) for name, tensor in tensors.items()},
    }
    header = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "fused_lm": json.dumps(document, sort_keys=True),
    }
    return save(tensors, metadata=header)


def write(path: str | os.PathLike[str], content: bytes) -> int:
    """Writes what :func:`pack` made; result and errors of :func:`save_checkpoint`."""
    path = Path(path)
    try:
        write_atomically(path, content)
    except OSError as error:
        kept = "; the checkpoint that was there is untouched" if path.is_file() else ""
        raise CheckpointError(
            f"{path} can't be written ({error.strerror or error}); "
            f"expected a writable folder with {len(content) / 1e6:.1f} MB free{kept}."
        ) from error
    return len(content)


def read_checkpoint(path: str | os.PathLike[str], *, training_state: bool = False) -> Checkpoint:
    """Reads a checkpoint file, or the one in a folder, and checks every byte that it uses.

    Args:
        path: File or folder.
        training_state: Whether to read what resuming needs besides the weights.
    Raises:
        CheckpointError: If it is missing, a pickle, foreign, corrupt or of another version.
    """
    from safetensors import SafetensorError, safe_open

    file = checkpoint_file(path)
    _check_file(file)
    try:
        with safe_open(str(file), framework="pt") as stored:
            document = _document(file, stored.metadata())
            names = list(stored.keys())
            names = [n for n in names if training_state or n.startswith(("model/", _TOKENIZER))]
            tensors = {name: stored.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} is corrupt or cut off ({error}); "
            "expected a whole checkpoint of fused-lm train."
        ) from error
    for name, tensor in tensors.items():
        if document["crc32"].get(name) != _crc32(tensor):
            raise CheckpointError(
                f"{file} is corrupt: the checksum of {name} differs; "
                "expected the bytes that fused-lm train wrote."
            )
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "generator": {}}
    stored_tokenizer = tensors.pop(_TOKENIZER, None)
    if (stored_tokenizer is None) == (document["vocabulary"] == BPE):
        raise CheckpointError(
            f"{file} has the vocabulary {document['vocabulary']!r} and "
            f"{'no' if stored_tokenizer is None else 'a'} tokenizer; "
            "expected a checkpoint of fused-lm train."
        )
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        parts.get(part, {})[rest] = tensor
    weights = parts["model"]
    weights |= {name: weights[of] for name, of in document["tied"].items() if of in weights}
    return Checkpoint(
        path=file,
        config=document["config"],
        step=document["step"],
        run=document["run"],
        weights=weights,
        optimizer=parts["optimizer"],
        generators=parts["generator"],
        tokenizer=None if stored_tokenizer is None else stored_tokenizer.numpy().tobytes().decode(),
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Tensors of an optimizer's state as "<state>/<parameter name>" -> tensor."""
    return {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def _stored_once(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Splits a state dict into tensors to store and names that share one of them."""
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        if is_shared(tensor):  # a share may be empty and so at no place in memory
            stored[name] = tensor
            continue
        memory = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and memory in first:
            tied[name] = first[memory]
        else:
            first[memory] = name
            stored[name] = tensor
    return stored, tied


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _check_file(file: Path) -> None:
    """Refuses what isn't a readable file, and pickles by their first bytes."""
    try:
        with open(file, "rb") as opened:
            start = opened.read(4)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file} does not exist; expected the folder of a training run or its {FILE_NAME}."
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{file} can't be read ({error.strerror or error}); "
            "expected a checkpoint of fused-lm train."
        ) from error
    # A small safetensors header may be 0x80 bytes long, so those four bytes alone prove nothing.
    if start.startswith(_PICKLE_STARTS) and _header_bytes(file) is None:
        raise CheckpointError(
            f"{file} is a pickle (torch.save), and pickles are never loaded: they can run code; "
            f"expected a {FILE_NAME} of fused-lm train."
        )


def _header_bytes(file: Path) -> int | None:
    """Length of the safetensors header, or None if the file's first bytes can't be one."""
    with open(file, "rb") as opened:
        start = opened.read(9)
    length = int.from_bytes(start[:8], "little")
    return length if start[8:] == b"{" and length <= file.stat().st_size else None


def _document(file: Path, header: Mapping[str, str] | None) -> dict[str, Any]:
    """The JSON document of a header, with every field present and of its type."""
    header = header or {}
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{file} is a safetensors file of another program; "
            "expected a checkpoint of fused-lm train."
        )
    if header.get("format_version") != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{file} has format version {header.get('format_version')}; "
            f"this fused_lm reads version {FORMAT_VERSION}."
        )
    document = json.loads(header.get("fused_lm", ""))
    fields = {"config": dict, "step": int, "run": dict, "tied": dict, "crc32": dict}
    for name, kind in fields.items():
        if not isinstance(document, dict) or not isinstance(document.get(name), kind):
            raise ValueError(f"its header has no valid {name!r}")
    if document.get("vocabulary") not in KINDS:
        raise CheckpointError(
            f"{file} has the vocabulary {document.get('vocabulary')!r}; "
            f"this fused_lm reads {' and '.join(KINDS)}."
        )
    return document
