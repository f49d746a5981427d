"""``fused-lm parity --module``: right modules pass, every kind of wrong one is caught, and what can
be given. ``fuse()`` is a stand-in here that puts a planted class onto every LayerNorm.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import types
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_lm import cli, dispatch
from fused_lm.commands import own_module, parity_module
from fused_lm.commands.errors import UserError
from fused_lm.parity import module as measured
from fused_lm.parity.module import compare_pair, prepare
from fused_lm.parity.module_costs import memory, speed
from fused_lm.parity.module_runs import cotangents_of

SOURCE = """
import dataclasses
import torch
from torch import nn
class Block(nn.Module):
    def __init__(self, width=8, kind="tensor", dropout=0.0):
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.dropout, self.kind = nn.Dropout(dropout), kind
    def forward(self, x, scale=None):
        out = self.dropout(self.norm(self.linear(x)))
        out = out if scale is None else out * scale
        return {"out": out, "best": out.argmax(-1), "n": 3} if self.kind == "dict" else out
@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    hidden: tuple
class Tuples(Block):
    def forward(self, x):
        out = super().forward(x)
        return Answer(out, (out * 2, [out > 0, object()]))
    def example_inputs(self):
        return torch.randn(2, 8)
class Ids(Block):
    def forward(self, ids, mask=None):
        return super().forward(nn.functional.one_hot(ids, 8).to(self.linear.weight)) * mask
def make(): return Block()
def inputs(): return (torch.randn(2, 8),), {"scale": torch.rand(8)}
def broken(): raise RuntimeError("no luck")
block, number = Block(), 3
"""


class Norm(nn.LayerNorm):
    """A right one, whose rounding is another than torch's."""

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        rstd = (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return centred * rstd * self.weight + self.bias


THIRD = torch.tensor([2])
WRONG: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "output": lambda norm, x, out: out * (1.0 + 1e-5),
    "without gradients": lambda norm, x, out: out if out.requires_grad else out * (1.0 + 1e-5),
    "gradient": lambda norm, x, out: out + 1e-4 * (x - x.detach()),
    "no bias gradient": lambda norm, x, out: out - (norm.bias - norm.bias.detach()),
    "one NaN": lambda norm, x, out: out.flatten().index_fill(0, THIRD, math.nan).view_as(x),
    "NaN gradient": lambda norm, x, out: out + (x * 0.0).sqrt(),
    "other shape": lambda norm, x, out: out[:1],
    "detached": lambda norm, x, out: out.detach(),
    "raises": lambda norm, x, out: out.view(7, 7),
    "reversed": lambda norm, x, out: -out,
    "no inf": lambda norm, x, out: out - torch.tensor([0.0, 0.0, math.inf, 0.0], dtype=x.dtype),
    "unless forced": lambda norm, x, out: out * (len(dispatch.current_backend()) - 8),
    "slow": lambda norm, x, out: out if sleep(0.15) is None else x,
}


def wrong(how: str) -> type[nn.Module]:
    class Planted(Norm):
        def forward(self, x: Tensor) -> Tensor:
            return WRONG[how](self, x, super().forward(x))

    return Planted


Change = namedtuple("Change", "path was now backend reason")


def fuse(model: nn.Module, onto: type[nn.Module] = Norm, what: Any = nn.LayerNorm) -> Any:
    rows = []
    for path, part in model.named_modules():
        if type(part) is what:
            part.__class__ = onto
            rows.append(Change(path, what.__name__, onto.__name__, "pytorch", ""))
    return types.SimpleNamespace(rows=tuple(rows), changed=len(rows))


def fuse_with(onto: type[nn.Module], what: Any = nn.LayerNorm) -> Callable[[nn.Module], Any]:
    return functools.partial(fuse, onto=onto, what=what)


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[nn.Module]], None]:
    """Makes the command's ``fuse()`` put a class onto every LayerNorm."""

    def planted(onto: type[nn.Module]) -> None:
        name = "fused_lm.integrations.fuse"
        stand_in = types.ModuleType(name)
        stand_in.fuse = fuse_with(onto)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, stand_in)

    monkeypatch.setattr(parity_module, "speed", functools.partial(speed, seconds=0.01))
    planted(Norm)
    return planted


@pytest.fixture
def own(tmp_path: Path, plant: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A file with modules of a user's, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_modules.py").write_text(SOURCE)
    yield str(tmp_path / "own_modules.py")
    for name in ("own_modules", "fused_lm_parity_own_modules"):
        sys.modules.pop(name, None)


def parity(*arguments: str) -> int:
    return cli.main(["parity", "--device", "cpu", "--module", *arguments])


def test_a_right_module_passes(own: str, capsys: Any, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    arguments = ("--kwargs", '{"width": 16}', "--input", "2,5,16", "--json", str(file))
    assert parity(f"{own}:Block", *arguments) == 0
    text = capsys.readouterr().out
    for part in ("namespace(rows=(Change(", "7 of 7 tensors", "nothing about a GPU", "norm.bias"):
        assert part in text
    found = json.loads(file.read_text())
    names = {row["name"] for row in found["tensors"]}
    weights = {f"d {part}.{name}" for part in ("linear", "norm") for name in ("weight", "bias")}
    assert names == {"out", "no_grad out", "d args[0]"} | weights
    assert found["ok"] and found["exact"] == "float64" and found["changed"] == 1
    assert found["fused"][0]["path"] == "norm"
    assert all(0 < row["error"] <= row["allowed"] for row in found["tensors"])
    assert any(row["error"] != row["stock_error"] for row in found["tensors"])
    assert all(t["stock"] > 0 and t["fused"] > 0 for t in found["times_us"].values())
    assert found["memory_bytes"]["fused"] > found["memory_bytes"]["stock"] > 0


@pytest.mark.parametrize(
    "how, tensor, why",
    [
        ("output", "out", "worst at"),
        ("without gradients", "no_grad out", "worst at"),
        ("gradient", "d linear.weight", "worst at"),
        ("no bias gradient", "d norm.bias", "worst at"),
        ("one NaN", "out", "NaN differs at 1 places"),
        ("NaN gradient", "d args[0]", "NaN differs"),
        ("other shape", "out", "shape [1, 8], expected [3, 8]"),
        ("detached", "d norm.weight", "missing after fuse()"),
        ("raises", "the fused module", "RuntimeError: shape '[7, 7]' is invalid"),
    ],
)
def test_a_wrong_module_is_caught(
    how: str, tensor: str, why: str, own: str, plant: Any, capsys: Any, tmp_path: Path
) -> None:
    plant(wrong(how))
    file = tmp_path / "found.json"
    assert parity(f"{own}:Block", "--input", "3,8", "--json", str(file)) == 1
    assert "FAIL" in (text := capsys.readouterr().out) and f"{tensor}: " in text
    rows = {row["name"]: row for row in json.loads(file.read_text())["tensors"]}
    assert why in rows[tensor]["problem"]
    if "gradient" in how and how != "without gradients":
        assert rows["out"]["problem"] is None, "only its gradient is wrong"
    if how == "without gradients":
        assert rows["out"]["problem"] is None and rows["d args[0]"]["problem"] is None


class Logs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + torch.tensor([0.0, 0.0, math.inf, math.nan], dtype=x.dtype)


def test_nan_of_both_is_no_fault_and_hides_none() -> None:
    x = torch.randn(3, 4)
    assert torch.equal(cotangents_of({"y": x.log()})["y"] == 0.0, x.log().isnan())
    assert compare_pair(prepare(Logs(), (x,), fuse=fuse)).ok
    found = compare_pair(prepare(Logs(), (x,), fuse=fuse_with(wrong("no inf"))))
    assert {row.name for row in found.rows if row.problem} == {"out", "no_grad out"}
    found = compare_pair(prepare(Logs(), (x,), fuse=fuse_with(wrong("gradient"))))
    assert {row.name for row in found.rows if row.problem} == {"d args[0]"}


def test_what_stock_overflows_is_said() -> None:
    class Squares(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x * 1e-3

    class Small(Squares):
        def forward(self, x: Tensor) -> Tensor:
            return x * (x * 1e-3)

    x = torch.full((1, 4), 1e3)
    pair = prepare(Squares(), (x,), dtype=torch.float16, fuse=fuse_with(Small, Squares))
    found = compare_pair(pair)
    assert found.ok and "nothing is proven of: no_grad out, out" in found.notes[0]
    worse = compare_pair(pair._replace(stock=pair.fused, fused=pair.stock))
    assert {row.name for row in worse.rows if row.problem} == {"no_grad out", "out"}


def test_numbers_that_are_not_floats_must_be_equal(own: str, plant: Any, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    arguments = ("--args", '[8, "dict"]', "--input", "3,8", "scale=8", "--json", str(file))
    assert parity(f"{own}:Block", *arguments) == 0
    rows = {row["name"]: row for row in json.loads(file.read_text())["tensors"]}
    assert {"out['out']", "out['best']", "out['n']", "d kwargs['scale']"} < set(rows)
    assert rows["out['best']"]["error"] == rows["out['best']"]["allowed"] == 0
    plant(wrong("reversed"))
    assert parity(f"{own}:Block", *arguments) == 1
    rows = {row["name"]: row for row in json.loads(file.read_text())["tensors"]}
    assert rows["out['best']"]["problem"] == "out['best']: 3 of 3 values differ from stock"


def test_outputs_are_looked_for_in_dataclasses(own: str, tmp_path: Path) -> None:
    """And the inputs come from ``example_inputs()``; the module from the current folder."""
    file = tmp_path / "found.json"
    assert parity("own_modules:Tuples", "--json", str(file)) == 0
    found = json.loads(file.read_text())
    names = {row["name"] for row in found["tensors"]}
    assert {"out.logits", "out.hidden[0]", "out.hidden[1]"} < names
    assert any("not compared: out.hidden[2], of type object" in note for note in found["notes"])


@pytest.mark.parametrize(
    "words",
    [
        "Ids --input 2,5:int64<8 --input mask=2,5,1:bool",
        "make --input 2,8",
        "block --input 2,8 --backend triton",
        "block --input 2,8 --backend reference --dtype bfloat16",
        "Block --inputs own_modules.py:inputs --dtype float64",
    ],
)
def test_what_can_be_given(words: str, own: str, capsys: Any) -> None:
    name, *arguments = words.split()
    assert parity(f"{own}:{name}", *arguments) == 0
    assert ("stock's speed" in capsys.readouterr().out) == ("triton" not in words), "interpreted"
    assert own_module.load(f"{own}:block", "") is own_module.load(f"{own}:block", "")


@pytest.mark.usefixtures("own")
def test_a_module_of_torch(capsys: Any) -> None:
    arguments = ("--kwargs", '{"d_model": 16, "nhead": 2, "batch_first": true}')
    layer = "torch.nn:TransformerEncoderLayer"
    assert parity(layer, *arguments, "--input", "2,6,16", "--train") == 0
    text = capsys.readouterr().out
    for part in ("dropout was set to 0 in both modules, in 4", "training mode", "were constant"):
        assert part in text
    assert parity("torch.nn:Linear", "--args", "[4, 4]", "--input", "2,4") == 1
    assert "fuse() changed nothing in this module" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--module", "no_such_package:Model", "--input", "2"], "can't import no_such_package"),
        (["--module", "no_such.py:Model", "--input", "2"], "No such file"),
        (["--module", "Model"], "expected PACKAGE:NAME or FILE.py:NAME"),
        (["--module", "own_modules:Nobody", "--input", "2"], "own_modules has no Nobody"),
        (["--module", "own_modules:number", "--input", "2"], "is of type int, expected"),
        (["--module", "own_modules:Answer", "--args", "[1, 2]"], "returns an object of type"),
        (["--module", "own_modules:broken"], "can't be built (RuntimeError: no luck)"),
        (["--module", "own_modules:block", "--args", "[8]"], "is a module already"),
        (["--module", "own_modules:Block", "--args", "[8"], "--args is not JSON"),
        (["--module", "own_modules:Block", "--kwargs", "[8]"], "--kwargs is a list: expected"),
        (["--module", "own_modules:Block"], "--input 2,128,512"),
        (["--module", "own_modules:Block", "--input", "2,x"], "--input 2,x: expected a shape"),
        (["--module", "own_modules:Ids", "--input", "2:int64"], "2,128:int64<50257"),
        (["--module", "own_modules:Block", "--input", "2,7"], "fails on these inputs: RuntimeErr"),
        (["--module", "own_modules:Block", "--inputs", "own_modules:broken"], "inputs fails: Run"),
        (["--module", "own_modules:Block", "--inputs", "own_modules:x"], "--inputs own_modules:x"),
        (["--module", "own_modules:Block", "--inputs", "a:b", "--input", "2"], "can't go together"),
        (["--module", "own_modules:Block", "--quick"], "--quick"),
        (["--module", "own_modules:Block", "--dtype", "float32", "--dtype", "float16"], "once"),
        (["--input", "2,8"], "--input needs --module"),
        (["--train"], "--train needs --module"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("own")
def test_errors_are_one_sentence(arguments: list[str], text: str, capsys: Any) -> None:
    assert cli.main(["parity", "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and text in error and error.count("\n") == 1


@pytest.mark.parametrize("how", ["", "output", "gradient"])
def test_a_module_that_cannot_run_in_fp64(how: str) -> None:
    class Fp32Only(Logs):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype == torch.float64:
                raise TypeError("fp64 is not for me")
            return self.norm(x)

    planted = fuse_with(wrong(how)) if how else fuse
    found = compare_pair(prepare(Fp32Only(), (torch.randn(64, 4),), fuse=planted))
    assert found.ok == (not how) and found.exact == torch.float32
    assert all(row.stock_error > 0 for row in found.rows)
    assert any("fp64 is not for me" in n and "stock in fp32" in n for n in found.notes)


def test_fp64_has_an_error_too() -> None:
    """That of a changed last bit, where there is nothing wider."""
    x = torch.randn(64, 4, dtype=torch.float64)
    right = compare_pair(prepare(Logs().double(), (x,), dtype=torch.float64, fuse=fuse))
    assert right.ok and all(0 < row.stock_error < 1e-12 > row.error for row in right.rows)
    planted = fuse_with(wrong("output"))
    assert not compare_pair(prepare(Logs(), (x,), dtype=torch.float64, fuse=planted)).ok


def test_casts_inside_a_module_do_not_blur_what_is_exact() -> None:
    class Casts(Logs):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.float().exp()).to(x.dtype) @ torch.ones(4, 4, dtype=torch.float32)

    found = compare_pair(prepare(Casts(), (torch.randn(8, 4),), fuse=fuse))
    assert found.ok and found.exact == torch.float64 and found.notes == ()
    module, x = Casts(), torch.randn(8, 4)
    with measured._Wide():
        got = module.double()(x.double())
    wanted = module.norm(x.double().exp()) @ torch.ones(4, 4, dtype=torch.float64)
    assert torch.equal(got, wanted) and torch.get_default_dtype() == torch.float32


def test_dropout_and_other_chance() -> None:
    class Chance(Logs):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + torch.rand_like(x)

    model = nn.Sequential(nn.LayerNorm(4), nn.Dropout(0.5))
    found = compare_pair(prepare(model, (torch.randn(8, 4),), train=True, fuse=fuse))
    assert found.ok and "dropout was set to 0 in both modules, in 1 places" in found.notes
    assert model[1].p == 0.5 and type(model[0]) is nn.LayerNorm, "the user's own stays as it is"
    with pytest.raises(ValueError, match="out depends on the random seed"):
        compare_pair(prepare(Chance(), (torch.randn(8, 4),), fuse=fuse))


def test_a_tensor_given_twice_stays_one_and_may_be_written_to() -> None:
    class Same(Logs):
        def forward(self, x: Tensor, y: list[Tensor]) -> Tensor:
            assert x is y[0]
            x += 1.0
            return self.norm(y[0])

    x = torch.randn(8, 4)
    before = x.clone()
    found = compare_pair(prepare(Same(), (x, [x]), fuse=fuse))
    assert found.ok and torch.equal(x, before)
    assert [row.name for row in found.rows if "args" in row.name] == ["d args[0]"]


def test_a_module_without_tensors_or_gradients() -> None:
    class Nothing(Logs):
        def forward(self, x: Tensor) -> None:
            return None

    class Best(Logs):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x).argmax(-1)

    with pytest.raises(ValueError, match="returns no tensor"):
        compare_pair(prepare(Nothing(), (torch.randn(8, 4),), fuse=fuse))
    found = compare_pair(prepare(Best(), (torch.randn(8, 4),), fuse=fuse))
    assert found.ok and "no output has a gradient: only outputs were compared" in found.notes


def test_bytes_kept_for_the_backward() -> None:
    class Stock(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x  # keeps x, twice the same

    class Fused(Stock):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin().exp()  # keeps x and its own result

    pair = prepare(Stock(), (torch.randn(100, 10),), fuse=fuse_with(Fused, Stock))
    assert memory(pair)[1:] == (4000, 8000)
    linear = prepare(nn.Linear(10, 10), (torch.randn(100, 10),), fuse=fuse)
    assert memory(linear)[1] == 4000, "its input, and not its weight"


def test_times_are_of_the_right_module() -> None:
    pair = prepare(nn.LayerNorm(4), (torch.randn(8, 4),), fuse=fuse_with(wrong("slow")))
    times = speed(pair, 0.05)
    assert [what for what, _, _ in times] == ["forward, no gradients", "forward and backward"]
    assert all(fused >= 1.5e5 and fused > stock > 0 for _, stock, fused in times)
    assert all(p.grad is None for p in (*pair.stock.parameters(), *pair.fused.parameters()))


def test_constant_parameters_are_shaken() -> None:
    """Else a norm that leaves its weight out would give the right output."""
    norm, linear = nn.LayerNorm(64), nn.Linear(4, 4)
    before = linear.weight.clone()
    assert own_module.shake_constants(nn.ModuleList([norm, linear])) == 2
    assert norm.weight.std() > 0.05 and norm.bias.std() > 0.05
    assert torch.equal(linear.weight, before)


def test_a_forced_backend_is_for_the_fused_module() -> None:
    x, planted = torch.randn(8, 4), fuse_with(wrong("unless forced"))
    assert compare_pair(prepare(Logs(), (x,), backend="reference", fuse=planted)).ok
    assert not compare_pair(prepare(Logs(), (x,), fuse=planted)).ok


def test_forms_of_inputs() -> None:
    name, ids = own_module.parse_input("ids=2,300:int32<5")
    assert name == "ids" and ids.dtype == torch.int32 and ids.shape == (2, 300)
    assert int(ids.max()) == 4 and int(ids.min()) == 0
    (x, mask), take = torch.randn(2, 2), own_module.as_inputs
    assert take(x) == ((x,), {}) and take({"x": x}) == ((), {"x": x})
    assert take((x, mask)) == ((x, mask), {}) == take([x, mask])
    assert take(((x,), {"mask": mask})) == ((x,), {"mask": mask})
    with pytest.raises(UserError, match="expected a shape"):
        own_module.parse_input("2:int64<0")


def test_the_fuse_of_this_package() -> None:
    """Kernels in place of torch's modules, on whatever backend runs here."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    pair = prepare(layer, (torch.randn(2, 6, 16),), backend="reference")
    found = compare_pair(pair)
    assert pair.report.changed > 0
    assert found.ok, [row.problem for row in found.rows if row.problem]
