"""A module that a command line names: found, built, and fed."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_lm.commands.errors import UserError
from fused_lm.parity.module_runs import SEED, Inputs, one_line

EXAMPLE = "torch.nn:TransformerEncoderLayer"
INPUT = re.compile(r"(?:(\w+)=)?(\d+(?:,\d+)*)(?::(?:(bool)|(int32|int64)<(\d+)))?")
SHAKE = 0.1


def build(spec: str, args: str | None, kwargs: str | None) -> tuple[nn.Module, list[str]]:
    """The module that ``--module`` names, and what was done to it.

    Raises:
        UserError: There is none, or it can't be built.
    """
    found = load(spec, "--module")
    positional, named = _json("--args", args, list), _json("--kwargs", kwargs, dict)
    torch.manual_seed(SEED)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise UserError(
                f"--module {spec} is of type {type(found).__name__}, expected an nn.Module"
            )
        try:
            found = found(*positional, **named)
        except Exception as error:
            how = "give its arguments as --args and --kwargs, in JSON"
            raise UserError(f"{spec} can't be built ({one_line(error)}): {how}") from error
        if not isinstance(found, nn.Module):
            kind = type(found).__name__
            raise UserError(f"{spec} returns an object of type {kind}, expected an nn.Module")
    elif positional or named:
        raise UserError(f"{spec} is a module already: --args and --kwargs are for a constructor")
    shaken = shake_constants(found)
    note = f"{shaken} parameters were constant, which hides errors: they got random values"
    return found, [note] if shaken else []


def shake_constants(module: nn.Module) -> int:
    """Gives random values to parameters that are constant, as those of new norms and gates are:
    behind a weight of 0 or 1 an error doesn't show. Returns their number.
    """
    random = torch.Generator().manual_seed(SEED)
    shaken = 0
    for parameter in module.parameters():
        data = parameter.data
        if data.is_floating_point() and data.numel() and bool((data == data.flatten()[0]).all()):
            noise = SHAKE * torch.randn(data.shape, generator=random).to(data)
            data.copy_(data * (1.0 + noise) + noise * (data == 0.0))
            shaken += 1
    return shaken


def load(spec: str, option: str) -> Any:
    """What ``package:name`` or ``path/to/file.py:name`` stands for.

    Raises:
        UserError: It isn't there, or importing it fails.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise UserError(f"{option} {spec}: expected PACKAGE:NAME or FILE.py:NAME, as in {EXAMPLE}")
    try:
        found = _home(where)
    except Exception as error:
        raise UserError(f"{option} {spec}: can't import {where}: {one_line(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise UserError(f"{option} {spec}: {where} has no {name}")
        found = getattr(found, part)
    return found


def _home(where: str) -> Any:
    """The Python module of that name or in that file, which finds what lies beside it."""
    path = Path(where).resolve()
    is_file = where.endswith(".py")
    folder = str(path.parent if is_file else Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if not is_file:
        return importlib.import_module(where)
    name = f"fused_lm_parity_{path.stem}"
    if (known := sys.modules.get(name)) is not None and known.__file__ == str(path):
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _json(option: str, text: str | None, kind: type) -> Any:
    if text is None:
        return kind()
    example = "'[64, 4]'" if kind is list else """'{"d_model": 64, "nhead": 4}'"""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{option} is not JSON ({error}): expected as in {example}") from error
    if not isinstance(value, kind):
        raise UserError(f"{option} is a {type(value).__name__}: expected as in {example}")
    return value


def inputs_of(module: nn.Module, args: argparse.Namespace) -> Inputs:
    """From ``--input``, ``--inputs``, ``example_inputs()`` of the module or beside it, or what
    transformers calls ``dummy_inputs``; random ones follow from a fixed seed.

    Raises:
        UserError: None of these is there, or both options are.
    """
    if args.input and args.inputs:
        raise UserError("--input and --inputs can't go together")
    torch.manual_seed(SEED)
    if args.input:
        made = [parse_input(text) for text in args.input]
        named = {name: tensor for name, tensor in made if name}
        return Inputs(tuple(tensor for name, tensor in made if not name), named)
    beside = _home(args.module.rpartition(":")[0])
    if args.inputs:
        make = load(args.inputs, "--inputs")
    elif callable(getattr(module, "example_inputs", None)):
        make = module.example_inputs
    elif callable(getattr(beside, "example_inputs", None)):
        make = beside.example_inputs
    elif isinstance(getattr(module, "dummy_inputs", None), dict):
        return as_inputs(module.dummy_inputs)
    else:
        raise UserError(
            "what goes into the module is unknown: give a shape for each tensor, as in "
            "--input 2,128,512 or --input '2,128:int64<50257', or --inputs PACKAGE:FUNCTION"
        )
    try:
        return as_inputs(make())
    except Exception as error:
        raise UserError(f"the function that makes inputs fails: {one_line(error)}") from error


def as_inputs(made: Any) -> Inputs:
    """A tensor, (args, kwargs), args or kwargs."""
    if isinstance(made, Mapping):
        return Inputs((), dict(made))
    if isinstance(made, Tensor):
        return Inputs((made,), {})
    if len(made) == 2 and isinstance(made[0], tuple | list) and isinstance(made[1], Mapping):
        return Inputs(tuple(made[0]), dict(made[1]))
    return Inputs(tuple(made), {})


def parse_input(text: str) -> tuple[str | None, Tensor]:
    """``[name=]shape[:dtype<bound]``: (name, random tensor).

    Raises:
        UserError: It reads otherwise.
    """
    match = INPUT.fullmatch(text)
    if match is None or match[5] == "0":
        forms = "2,128,512 or 2,128:int64<50257 or mask=2,128:bool"
        raise UserError(f"--input {text}: expected a shape, with a dtype or not, as in {forms}")
    name, shape, boolean, integer, bound = match.groups()
    sizes = [int(size) for size in shape.split(",")]
    if boolean:
        return name, torch.rand(sizes) < 0.5
    if integer:
        return name, torch.randint(int(bound), sizes, dtype=getattr(torch, integer))
    return name, torch.randn(sizes)
