"""Run the cases of the emulated kernels, with the errors of each one.

    python -m tests.ptx_emulator.run [--arch 70 80 90] [--only REGEX] [--noise ULP]
        [--schedule lockstep|forward|backward] [--quick] [--verbose]

A line per case and architecture: the largest errors beside those of eager float32, and what is at
fault. Exit status 1 if anything is. ``--schedule`` runs one warp as far as it can, which shows what
a race does to the result; ``--noise`` perturbs approximate functions by so many units in the last
place.
"""

from __future__ import annotations

import argparse
import re
import sys
import time

import torch

from tests.ptx_emulator.case import ARCHS
from tests.ptx_emulator.cases import all_cases
from tests.ptx_emulator.report import Report
from tests.ptx_emulator.triton_bridge import Session


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS)
    parser.add_argument("--only", default="", help="cases whose name this regular expression finds")
    parser.add_argument("--noise", type=int, default=0)
    parser.add_argument("--schedule", default="lockstep")
    parser.add_argument("--quick", action="store_true", help="no case that the tests call slow")
    parser.add_argument("--verbose", action="store_true", help="harmless findings too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed, total = 0, Report()
    for arch in options.arch:
        session = Session(arch, approx_noise=options.noise, schedule=options.schedule)
        for case in all_cases():
            if not re.search(options.only, case.name) or (options.quick and arch not in case.quick):
                continue
            start = time.process_time()
            check = case.check(session)
            failed += bool(check.wrong)
            print(
                f"sm_{arch} {case.name:<44}{'BAD' if check.wrong else 'ok':<4}"
                f"{time.process_time() - start:5.1f} s  {'; '.join(check.notes)}",
                *check.wrong,
                sep="\n    ",
                flush=True,
            )
            total.merge(session.report)
        print(f"sm_{arch}: " + ", ".join(f"{k} {v:.0f} s" for k, v in session.seconds.items()))
    if options.verbose:
        print(total)
    print(f"{failed} failed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
