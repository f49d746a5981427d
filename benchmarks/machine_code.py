"""SASS read as a graph: classes of instructions, loops, and paths through one of them.

A kernel's code holds every case of its arguments, so the sum over all instructions is what no warp
executes. A region (the main loop, or the whole of a kernel without one) is therefore walked on two
paths from its head to its end, inner loops once:

- heavy: the most instructions, roughly the call with every feature on;
- lean: the most time of DRAM after time of issue is taken off, roughly the call that does nothing
  but move its tensors.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

CLASSES = {
    "tensor": r"HMMA|HGMMA|IMMA|DMMA|QMMA|OMMA|QGMMA|UTC\w*MMA",
    "LDG": r"LDG|LD",
    "STG": r"STG|ST|RED\w*|ATOM|ATOMG",
    "LDS": r"LDS|LDSM",
    "STS": r"STS|STSM|ATOMS",
    "LDGSTS": r"LDGSTS",
    "TMA": r"UTMA\w+|UBLK\w+",
    "local": r"LDL|STL",
    "MUFU": r"MUFU",
    "convert": r"I2F|F2I|F2F|FRND|POPC|FLO|BREV",
    "FP32": r"FFMA2?|FMUL2?|FADD2?|FFMA32I|FMUL32I|FADD32I|IMAD|HFMA2|HADD2|HMUL2",
    "shuffle": r"SHFL",
    "barrier": r"BAR|SYNCS|DEPBAR|LDGDEPBAR|WARPGROUP|WARPSYNC|MEMBAR|FENCE|ERRBAR|CCTL|ARRIVES",
    "branch": r"BRA|BRX|BRXU|JMP|EXIT|BSSY|BSYNC|BREAK|CALL|RET|NANOSLEEP|YIELD|BMOV",
    "uniform": r"U[A-Z0-9]+|R2UR|S2UR|LDCU|LDC|S2R|CS2R|NOP",
    "ALU": r".*",
}
"""The first that matches. FP32 is the pipe of multiply-adds, IMAD and packed halves with it;
convert are the conversions that the MUFU's unit does; uniform costs a warp no more than its issue
slot. F2FP and I2FP are ALU's."""

_CLASS = {name: re.compile(rf"(?:{pattern})$") for name, pattern in CLASSES.items()}
_WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1, "8": 1}
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
_ENDS = ("EXIT", "RET", "BRX", "BRXU", "JMX", "KILL")


@functools.cache
def _kind_of(base: str) -> str:
    return next(name for name, pattern in _CLASS.items() if pattern.match(base))


@dataclass(frozen=True)
class Instruction:
    """``conditional``: some lanes or all may not execute it."""

    address: int
    opcode: str
    operands: str
    conditional: bool

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def kind(self) -> str:
        """One of ``CLASSES``."""
        return _kind_of(self.base)

    @property
    def width(self) -> int:
        """Bytes per thread that a memory instruction moves."""
        parts = self.opcode.split(".")[1:]
        if self.base in ("LDSM", "STSM"):  # 8x8 matrices of 16 bits, 4 bytes per thread
            return 4 * next((int(part) for part in parts if part in "124"), 1)
        return next((_WIDTHS[part] for part in parts if part in _WIDTHS), 4)

    @property
    def global_bytes(self) -> int:
        """Per thread; what TMA moves is not in its instruction."""
        return self.width if self.kind in ("LDG", "STG", "LDGSTS") else 0

    @property
    def is_streaming(self) -> bool:
        """A load that the code keeps out of the L1: ptx::load_streaming, cp.async.cg."""
        marks = {"LDG": "NA", "LDGSTS": "BYPASS"}
        return marks.get(self.kind) in self.opcode.split(".")

    @property
    def shared_bytes(self) -> int:
        """Per thread. A shuffle takes the same unit for as long as 4 bytes."""
        if self.kind in ("LDS", "STS", "LDGSTS"):
            return self.width
        return 4 if self.kind == "shuffle" else 0

    @property
    def flops(self) -> int:
        """Of the tensor cores, per warp; 0 where the shape is not in the name."""
        if self.base == "HMMA" and (shape := re.search(r"\.16(8)(16|8)\b", self.opcode)):
            return 2 * 16 * int(shape[1]) * int(shape[2])
        if self.base == "HGMMA" and (shape := re.search(r"\.64x(\d+)x(\d+)", self.opcode)):
            return 2 * 64 * int(shape[1]) * int(shape[2]) // 4  # a fourth of the warpgroup's
        return 0


def parse(lines: Iterable[str]) -> list[Instruction]:
    """Lines as build_tools.cubin.disassemble gives them."""
    found = []
    for line in lines:
        address, text = line.split(None, 1)
        predicate, _, rest = text.partition(" ") if text.startswith("@") else ("", "", text)
        opcode, _, operands = rest.strip().partition(" ")
        operand = opcode.startswith("BRA") and re.match(r"!?U?P\d", operands.strip())
        conditional = bool(operand) or predicate not in ("", "@PT", "@UPT")
        found.append(Instruction(int(address, 16), opcode, operands.strip(), conditional))
    return found


@dataclass(frozen=True)
class Loop:
    """A natural loop: its blocks, by index, and the one through which it is entered."""

    head: int
    blocks: frozenset[int]


class Graph:
    """Basic blocks and their successors.

    The cold path of BRA.DIV is left out, which only a diverged warp takes, as are the insides of
    calls (a division's rare cases).
    """

    def __init__(
        self, code: list[Instruction], branch_targets: dict[int, list[int]] | None = None
    ) -> None:
        self._indirect = branch_targets or {}
        known = {i.address for i in code}
        leaders = {code[0].address}
        for at, instruction in enumerate(code):
            jumps = [t for t in self._targets(code, at) if t in known]
            if jumps or instruction.base in _ENDS:
                leaders.update(jumps, (i.address for i in code[at + 1 : at + 2]))
        self.blocks: list[list[Instruction]] = []
        for instruction in code:
            if instruction.address in leaders:
                self.blocks.append([])
            self.blocks[-1].append(instruction)
        index = {block[0].address: at for at, block in enumerate(self.blocks)}
        position = {instruction.address: at for at, instruction in enumerate(code)}
        self.successors: list[list[int]] = []
        for at, block in enumerate(self.blocks):
            last = block[-1]
            to = [index[t] for t in self._targets(code, position[last.address]) if t in index]
            leaves = last.base in _ENDS or (
                last.base in ("BRA", "JMP") and ".DIV" not in last.opcode
            )
            if (last.conditional or not leaves) and at + 1 < len(self.blocks):
                to.append(at + 1)
            self.successors.append(list(dict.fromkeys(to)))

    def _targets(self, code: list[Instruction], at: int) -> list[int]:
        instruction = code[at]
        if instruction.base in ("BRX", "BRXU"):
            return list(self._indirect.get(instruction.address, ()))
        target = _TARGET.search(instruction.operands)
        if instruction.base in ("BRA", "JMP") and ".DIV" not in instruction.opcode:
            return [int(target[1], 16)] if target else []
        if instruction.base == "BSYNC":  # on from where its BSSY said the lanes meet
            name = instruction.operands.split(",")[0]
            for earlier in reversed(code[:at]):
                if earlier.base == "BSSY" and earlier.operands.split(",")[0] == name:
                    meet = _TARGET.search(earlier.operands)
                    return [int(meet[1], 16)] if meet else []
        return []

    def order(self, within: frozenset[int], head: int) -> tuple[list[int], set[tuple[int, int]]]:
        """Blocks of a region so that all but the returned backward edges lead on."""
        done: list[int] = []
        open_blocks, seen, backward = set(), {head}, set()
        stack = [(head, iter(self.successors[head]))]
        open_blocks.add(head)
        while stack:
            block, successors = stack[-1]
            for to in successors:
                if to not in within:
                    continue
                if to in open_blocks:
                    backward.add((block, to))
                elif to not in seen:
                    seen.add(to)
                    open_blocks.add(to)
                    stack.append((to, iter(self.successors[to])))
                    break
            else:
                stack.pop()
                open_blocks.discard(block)
                done.append(block)
        return done[::-1], backward

    @cached_property
    def everything(self) -> Loop:
        """The kernel as a region."""
        order, _ = self.order(frozenset(range(len(self.blocks))), 0)
        return Loop(0, frozenset(order))

    @cached_property
    def loops(self) -> list[Loop]:
        """Natural loops: a backward edge to a block that every way in passes."""
        order, backward = self.order(self.everything.blocks, 0)
        dominators = self._dominators(order)
        before: dict[int, list[int]] = {block: [] for block in order}
        for block in order:
            for to in self.successors[block]:
                before[to].append(block)
        found: dict[int, set[int]] = {}
        for tail, head in backward:
            if head not in dominators[tail]:
                continue
            body, todo = found.setdefault(head, {head}), [tail]
            while todo:
                block = todo.pop()
                if block not in body:
                    body.add(block)
                    todo += before[block]
        return [Loop(head, frozenset(body)) for head, body in found.items()]

    def _dominators(self, order: list[int]) -> dict[int, set[int]]:
        everywhere = set(order)
        dominators = dict.fromkeys(order, everywhere) | {order[0]: {order[0]}}
        before: dict[int, list[int]] = {block: [] for block in order}
        for block in order:
            for to in self.successors[block]:
                before[to].append(block)
        changed = True
        while changed:
            changed = False
            for block in order[1:]:
                new = set.intersection(*(dominators[b] for b in before[block])) | {block}
                if new != dominators[block]:
                    dominators[block], changed = new, True
        return dominators

    def main_loop(self) -> Loop | None:
        """The loop with the most tensor instructions, then global bytes, of its own: those of a
        loop inside it are not. None if no loop has any.
        """

        def own(loop: Loop) -> tuple[int, int]:
            inner = [other.blocks for other in self.loops if other.blocks < loop.blocks]
            blocks = loop.blocks.difference(*inner)
            code = [i for block in blocks for i in self.blocks[block]]
            return sum(i.kind == "tensor" for i in code), sum(i.global_bytes for i in code)

        best = max(self.loops, key=own, default=None)
        return best if best is not None and any(own(best)) else None

    def path(self, region: Loop, worth: Callable[[Instruction], float]) -> list[Instruction]:
        """Of all ways from the head to the region's end, the one worth most."""
        order, backward = self.order(region.blocks, region.head)
        value = {b: sum(worth(i) for i in self.blocks[b]) for b in order}
        best: dict[int, tuple[float, int | None]] = {}
        for block in reversed(order):
            onward = [
                to
                for to in self.successors[block]
                if to in region.blocks and (block, to) not in backward
            ]
            # A loop's pass ends where it goes back to the head, a kernel's where nothing follows.
            if (block, region.head) in backward or not self.successors[block]:
                best[block] = (value[block], None)
            for to in onward:
                if to in best and (
                    block not in best or value[block] + best[to][0] > best[block][0]
                ):
                    best[block] = (value[block] + best[to][0], to)
        way, block = [], region.head
        while block is not None:
            way += self.blocks[block]
            block = best[block][1] if block in best else None
        return way


def mix_of(code: Iterable[Instruction]) -> dict[str, int]:
    """Instructions per class, in the order of ``CLASSES``."""
    counted = Counter(instruction.kind for instruction in code)
    return {name: counted[name] for name in CLASSES if counted[name]}
