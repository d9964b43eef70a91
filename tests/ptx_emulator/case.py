"""A case: what the launchers are asked for, and how its result is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.ptx_emulator.check import Check
from tests.ptx_emulator.triton_bridge import Session

ARCHS = (70, 80, 90)


@dataclass(frozen=True)
class Case:
    """``quick``: the architectures on which the case belongs to the suite that is run always."""

    name: str
    run: Callable[[Check], None]
    quick: tuple[int, ...] = ()

    def check(self, session: Session) -> Check:
        """Runs the case; whatever is at fault is in ``wrong`` of the result."""
        session.forget()
        check = Check(session)
        self.run(check)
        check.wrong += [str(fault) for fault in session.report.faults()]
        return check
