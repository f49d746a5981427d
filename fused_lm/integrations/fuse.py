"""``fuse(model)``: a model's modules become ours in place, and back.

A module's class is changed, nothing else: its Parameters, hooks, optimisers, tied weights,
``state_dict`` and ``deepcopy`` stay what they were, because the new class is a subclass that adds
no state. Only exact types are changed. A subclass, a parametrized or a sharded module may compute
something else than the class it came from, so it is left alone, and the report says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from fused_lm.nn.attention import MultiheadAttention
from fused_lm.nn.dropin import DropIn, is_drop_in
from fused_lm.nn.norm import LayerNorm, RMSNorm
from fused_lm.nn.transformer_encoder import TransformerEncoder
from fused_lm.nn.transformer_layers import TransformerDecoderLayer, TransformerEncoderLayer

_LAYERS = (TransformerEncoderLayer, TransformerDecoderLayer)
_CLASSES: dict[type, type[Any]] = {
    own.stock: own for own in (MultiheadAttention, LayerNorm, RMSNorm, TransformerEncoder, *_LAYERS)
}
_CONTAINERS = (nn.TransformerDecoder, nn.Transformer)

_WRAPPERS = {
    "DistributedDataParallel": "DistributedDataParallel",
    "DataParallel": "DataParallel",
    "FullyShardedDataParallel": "FSDP",
    "FSDPModule": "fully_shard",
    "OptimizedModule": "torch.compile",
}
"""torch's classes by name, because importing some of them takes a second, and what made them."""

_PARTS = ("forward", "_sa_block", "_mha_block", "_ff_block")
"""Methods that our forwards stand for; one that was replaced on an instance keeps its module."""


class Row(NamedTuple):
    """One module of a report: ``backend`` is what a call would run on now, in its own device and
    dtype; ``reason`` says why a module was left alone, and is empty for one that is ours.
    """

    path: str
    was: str
    now: str
    backend: str
    reason: str


@dataclass(frozen=True)
class FuseReport:
    """What :func:`fuse` did; ``str()`` of it is a table.

    Attributes:
        rows: A :class:`Row` for each module that has to do with it, in the model's order.
        changed: How many modules are ours now and were not before.
    """

    rows: tuple[Row, ...]
    changed: int

    def __str__(self) -> str:
        if not self.rows:
            return "fuse: nothing in this model has a fused counterpart"
        left = sum(bool(row.reason) for row in self.rows)
        table = [("module", "was", "is", "runs on")]
        for row in self.rows:
            end = f"left alone: {row.reason}" if row.reason else row.backend
            table.append((row.path or "(the model)", row.was, row.now, end))
        widths = [max(len(line[i]) for line in table) for i in range(3)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[3]])
            for line in table
        ]
        total = f"{self.changed} of {len(self.rows)} modules changed, {left} left alone"
        return "\n".join([*lines, total])


class _Change(NamedTuple):
    """A module, its class and its own attribute ``fuse_ffn`` before."""

    module: nn.Module
    was: type[nn.Module]
    fuse_ffn: Any


class _Done(NamedTuple):
    report: FuseReport
    changes: list[_Change]
    switched: list[nn.Module]


def fuse(
    model: nn.Module, attention: bool = True, norm: bool = True, ffn: bool = True
) -> FuseReport:
    """Puts our modules in the place of torch's and Hugging Face's, in place.

    Args:
        model: Any module that is not yet wrapped by DDP, FSDP or ``torch.compile``; itself counts.
            ``torch.fx`` is to trace it before: ours are no leaves to it, as torch's own are.
        attention: MultiheadAttention, TransformerEncoder, and the attention of Hugging Face models
            (their attention implementation becomes "fused_lm"; models that share a configuration
            share that).
        norm: LayerNorm, RMSNorm, and Hugging Face's.
        ffn: The feed-forward networks of TransformerEncoderLayer and TransformerDecoderLayer, and
            those of Hugging Face's GPT-2, BERT, ViT and Llama. These layers change class with any
            of the three, because in inference stock ones pass their submodules by.
    Returns:
        A :class:`FuseReport`; ``print`` it. Calling again changes nothing.
    Raises:
        TypeError: ``model`` is no module. RuntimeError: it is wrapped or compiled already.

    >>> print(fused_lm.fuse(model))
    """
    return _fuse(model, attention, norm, ffn).report


def unfuse(model: nn.Module) -> int:
    """Takes :func:`fuse` back: every module of exactly our classes that stands for a stock one
    becomes that again, those that were made as ours too. A subclass that someone made of ours, and
    a module whose forward was replaced since, stay.

    Returns:
        How many modules changed.
    """
    _check_is_module(model)
    ours = [m for m in model.modules() if is_drop_in(m) and "forward" not in m.__dict__]
    for module in ours:
        _set_fuse_ffn(module, None)
        stock: Any = module.stock
        module.__class__ = stock
    return len(ours) + _leave_hugging_face(list(model.modules()))


@contextmanager
def fused(
    model: nn.Module, attention: bool = True, norm: bool = True, ffn: bool = True
) -> Iterator[FuseReport]:
    """:func:`fuse` for the length of a ``with``: what was ours before stays ours after it. The
    backward of a checkpointed forward belongs into it too.

    >>> with fused_lm.fused(model) as report:
    ...     loss = model(x).sum()
    """
    done = _fuse(model, attention, norm, ffn)
    try:
        yield done.report
    finally:
        for change in done.changes:
            change.module.__class__ = change.was
            _set_fuse_ffn(change.module, change.fuse_ffn)
        _leave_hugging_face(done.switched)


def _fuse(model: nn.Module, attention: bool, norm: bool, ffn: bool) -> _Done:
    _check_is_module(model)
    _check_not_wrapped(model)
    wanted = {"attention": attention, "norm": norm, "ffn": ffn}
    attention_rows, switched = _enter_hugging_face(model) if attention else ([], [])
    changes: list[_Change] = []
    found: list[tuple[str, nn.Module, str, str]] = []
    for path, module in model.named_modules():
        name, before = type(module).__name__, module.__dict__.get("fuse_ffn")
        own = _own_class(type(module))
        if own is not None and _is_wanted(own, wanted):
            reason = _why_not(module, own)
            if reason == "":
                changes.append(_Change(module, type(module), before))
                module.__class__ = own
                _set_fuse_ffn(module, False if own in _LAYERS and not ffn else None)
            found.append((path, module, name, reason))
        elif (left := _why_left(module, wanted)) is not None:
            if ffn and before is not None:  # of an earlier call without it
                changes.append(_Change(module, type(module), before))
                _set_fuse_ffn(module, None)
            found.append((path, module, name, left))
    rows = (*attention_rows, *(_row(*item) for item in found))
    return _Done(FuseReport(rows, len(changes) + len(switched)), changes, switched)


def _set_fuse_ffn(module: nn.Module, value: Any) -> None:
    """None: what the class says."""
    module.__dict__.pop("fuse_ffn", None)
    if value is not None:
        module.__dict__["fuse_ffn"] = value


def _own_class(cls: type) -> type[Any] | None:
    """Ours for exactly this class."""
    if cls.__module__.startswith("transformers."):
        from fused_lm.integrations.huggingface_modules import own_class

        return own_class(cls)
    return _CLASSES.get(cls)


def _is_wanted(own: type[Any], wanted: dict[str, bool]) -> bool:
    return any(wanted.values()) if own in _LAYERS else wanted[own.kind]


def _why_not(module: nn.Module, own: type[Any]) -> str:
    """Why a module of the right class stays as it is, or "" """
    replaced = [name for name in _PARTS if name in module.__dict__]
    if replaced:
        return f"its {replaced[0]} was replaced on the instance"
    if own is TransformerEncoder and not len(module.layers):  # type: ignore[arg-type]
        return "it has no layers"
    return ""


def _why_left(module: nn.Module, wanted: dict[str, bool]) -> str | None:
    """The sentence for a module that has to do with fuse() but is none of its types: "" for one
    that is ours already, None where there is nothing to say.
    """
    if isinstance(module, DropIn):
        return ""
    if type(module) in _CONTAINERS:
        return "it only calls its layers, which have lines of their own"
    for stock, own in _CLASSES.items():
        if isinstance(module, stock) and _is_wanted(own, wanted):
            if hasattr(module, "parametrizations"):
                return f"its parameters are parametrized (exact type {type(module).__name__})"
            return f"a subclass of {stock.__name__}: only exact types are known to compute the same"
    if wanted["norm"] and type(module).__name__.endswith("RMSNorm"):
        return f"no fused class for {type(module).__module__}.{type(module).__qualname__}"
    return None


def _row(path: str, module: nn.Module, was: str, reason: str) -> Row:
    now = f"fused_lm {type(module).__name__}" if isinstance(module, DropIn) else was
    if not isinstance(module, DropIn):
        return Row(path, was, now, "", reason)
    try:
        return Row(path, was, now, module.likely_backend(), "")
    except Exception as error:  # a forced backend that refuses; sizes or dtypes that don't fit
        return Row(path, was, now, f"nothing: {str(error).splitlines()[0]}", "")


def _check_is_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse takes a torch.nn.Module, got {type(model).__name__}")


def _check_not_wrapped(model: nn.Module) -> None:
    for path, module in model.named_modules():
        torchs = [c.__name__ for c in type(module).__mro__ if c.__module__.startswith("torch.")]
        wrapper = next((_WRAPPERS[name] for name in torchs if name in _WRAPPERS), None)
        if wrapper is None and getattr(module, "_compiled_call_impl", None) is not None:
            wrapper = "torch.compile"
        if wrapper is not None:
            where = f"module {path!r}" if path else "the model"
            raise RuntimeError(f"fuse the model before {wrapper}, which has {where} already")


def _enter_hugging_face(model: nn.Module) -> tuple[list[Row], list[nn.Module]]:
    """Rows of the models of transformers in ``model``, and those that are on our attention now and
    were not before.
    """
    if not any(_is_hugging_face(module) for module in model.modules()):
        return [], []
    from fused_lm.integrations.huggingface_switch import likely_backend, use_fused_attention

    switch = use_fused_attention(model)
    rows, switched = [], []
    for path, module in model.named_modules():
        name = f"attention of {type(module).__name__}"
        if path in switch.left:
            was = str(module.config._attn_implementation)
            rows.append(Row(path, f"{name}: {was}", was, "", switch.left[path]))
        elif path in switch.changed:
            switched.append(module)
            was = f"{name}: {switch.changed[path]}"
            rows.append(Row(path, was, "fused_lm", likely_backend(module), ""))
    return rows, switched


def _leave_hugging_face(modules: list[nn.Module]) -> int:
    if not any(_is_hugging_face(module) for module in modules):
        return 0
    from fused_lm.integrations.huggingface_switch import leave_fused_attention

    return leave_fused_attention(modules)


def _is_hugging_face(module: nn.Module) -> bool:
    """Of transformers, or of a class made of one of its: only then is it imported."""
    return any(cls.__module__.startswith("transformers.") for cls in type(module).__mro__)
