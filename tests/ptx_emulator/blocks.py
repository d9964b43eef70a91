"""Instructions of an entry -> basic blocks, cut where lanes branch, meet or wait for each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.ptx_emulator.parser import Entry, Instruction

WARP_SYNC = {"shfl", "vote", "match", "redux", "mma", "ldmatrix", "stmatrix", "elect"}
TERMINATORS = {"bra", "ret", "exit", "trap"}


#: Of registers, batch and mask; the next block, or a condition and two blocks.
BlockFunction = Callable[[list[Any], Any, Any], Any]


@dataclass
class Block:
    """Instructions that run one after another, and the functions they were translated to."""

    index: int
    code: list[Instruction]
    sync: str | None = None  # warp, group (of four warps) or cta: who meets before it
    full: BlockFunction | None = None
    masked: BlockFunction | None = None
    classes: dict[str, int] = field(default_factory=dict)  # instructions of each kind


def opcode_class(ins: Instruction) -> str:
    """What an instruction mostly costs."""
    op = ins.op
    base = op[0]
    if base in ("ld", "st", "atom", "red"):
        space = next(
            (
                p.split("::")[0]
                for p in op
                if p.split("::")[0] in ("global", "shared", "local", "param")
            ),
            "generic",
        )
        return f"{base}.{space}"
    if base in ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh"):
        return "special function"
    if base == "div" or base == "rem":
        return "division"
    if base == "cvt":
        return "conversion"
    if base in ("mma", "wgmma", "cp", "ldmatrix", "stmatrix", "shfl", "redux"):
        return base
    if base in ("bar", "barrier"):
        return "barrier"
    if base in ("bra", "ret", "exit"):
        return "branch"
    if base in ("mov", "selp", "prmt", "cvta"):
        return "move, select"
    if base == "setp":
        return "compare"
    kind = op[-1]
    if kind in ("f32", "f16", "bf16", "f16x2", "bf16x2"):
        return {"fma": "fp32 fma", "mul": "fp32 mul", "add": "fp32 add", "sub": "fp32 add"}.get(
            base, "fp32 other"
        )
    if kind == "f64":
        return "fp64"
    return "integer 64" if kind in ("s64", "u64", "b64") else "integer"


def make_blocks(entry: Entry) -> tuple[list[Block], dict[str, int]]:
    """The blocks, and the index of each label's."""
    blocks: list[Block] = [Block(0, [])]
    labels: dict[str, int] = {}

    def start() -> None:
        if blocks[-1].code:
            blocks.append(Block(len(blocks), []))

    for item in entry.code:
        if isinstance(item, str):
            start()
            labels[item] = blocks[-1].index
            continue
        sync = None
        if item.op[0] in WARP_SYNC or item.op[:2] == ["bar", "warp"]:
            sync = "warp"
        elif item.op[0] in ("bar", "barrier"):
            sync = "cta"
        elif item.op[:2] == ["wgmma", "mma_async"]:
            sync = "group"
        if sync:
            start()
            blocks[-1].sync = sync
        blocks[-1].code.append(item)
        if item.op[0] in TERMINATORS:
            start()
    if not blocks[-1].code:
        blocks[-1].code.append(Instruction(["ret"], [], None, False, "end", "ret"))
    for block in blocks:
        classes: dict[str, int] = defaultdict(int)
        for ins in block.code:
            classes[opcode_class(ins)] += 1
        block.classes = dict(classes)
    return blocks, labels
