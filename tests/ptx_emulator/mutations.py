"""Does the emulator miss the synchronisation of real kernels when it is taken away?

    python -m tests.ptx_emulator.mutations ARCH REGEX [INSTRUCTION ...]

For every case that the regular expression finds: each occurrence of an instruction (bar.sync,
bar.warp.sync, cp.async.wait_group, fence.proxy.async) is removed, one at a time, from the PTX of
the kernel that holds it. A removal that leads to no finding was redundant there, or is missed.
"""

from __future__ import annotations

import re
import sys

from tests.ptx_emulator.case import Case
from tests.ptx_emulator.cases import all_cases
from tests.ptx_emulator.triton_bridge import Session

INSTRUCTIONS = ["bar.sync", "bar.warp.sync", "cp.async.wait_group", "fence.proxy.async"]


def kernels_of(case: Case, arch: int) -> tuple[dict[str, str], set[tuple[str, ...]]]:
    """The PTX of the kernels that a case launches, by name, and the findings of the sound ones."""
    texts: dict[str, str] = {}

    def keep(kernel: str, ptx: str) -> str:
        return texts.setdefault(kernel, ptx)

    session = Session(arch, transform=keep)
    case.check(session)
    return texts, {key[:3] for key in session.report.findings}


def without(case: Case, arch: int, kernel: str, ptx: str) -> tuple[set[tuple[str, ...]], bool]:
    """The findings where ``kernel`` has this PTX, and whether values were wrong."""
    session = Session(arch, transform=lambda name, text: ptx if name == kernel else text)
    check = case.check(session)
    faults = len(session.report.faults())
    return {key[:3] for key in session.report.findings}, len(check.wrong) > faults


def main() -> int:
    arch, pattern, instructions = int(sys.argv[1]), sys.argv[2], sys.argv[3:] or INSTRUCTIONS
    statement = re.compile("(?:" + "|".join(re.escape(i) for i in instructions) + r")[^;]*;")
    for case in all_cases():
        if not re.search(pattern, case.name):
            continue
        texts, before = kernels_of(case, arch)
        counts = ", ".join(f"{name} {len(statement.findall(ptx))}" for name, ptx in texts.items())
        print(f"{case.name}: {counts}", flush=True)
        for kernel, ptx in texts.items():
            for found in statement.finditer(ptx):
                changed = ptx[: found.start()] + ptx[found.end() :]
                after, wrong = without(case, arch, kernel, changed)
                kinds = sorted({key[0] for key in after - before})
                line = ptx[: found.start()].count("\n") + 1
                source = re.findall(r"\.loc\s.*?//\s*(\S+)", ptx[: found.start()])[-1]
                print(
                    f"  {kernel} line {line} {found.group(0).strip()} ({source}): "
                    f"{', '.join(kinds) or 'nothing'}{'; VALUES WRONG' * wrong}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
