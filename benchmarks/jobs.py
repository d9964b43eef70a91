"""Jobs of a benchmark in order of worth, each under a deadline.

A job is one call of a function, ``"module:name"``, with keyword arguments that JSON can hold; it
returns a dict. Jobs of one group that follow each other share a process, so that the later ones
find it warm (imports, CUDA context, cuDNN's choices). After a job that failed, ran out of memory
or was late the process ends, and the next job starts in a new one: no job holds up the next for
longer than its limit, or leaves it anything. :class:`Results` keeps the outcomes in a file as they
come.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import processes
from harness import first_line
from result_files import header, results_path, write

#: Name of the job that finds what all figures belong to, by result_files.header(**arguments).
HEADER = "header"
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl
_CODE = "import sys, jobs; jobs.serve(*sys.argv[1:])"
_GRACE = 3.0  # a late job has nothing to write down
# Outcomes after which a process is not used again: it may hold memory, or a broken CUDA context.
_SPOILED = ("failed", "out_of_memory")
_SPOILED_STATUS = 10


@dataclass(frozen=True)
class Job:
    """A call with its deadline.

    Attributes:
        name: for people.
        arguments: of the function.
        limit: seconds after which it is ended, the start of its process included.
        least: seconds without which it is not begun.
        group: jobs of one group that follow each other share a process.
        kind: once a job of a kind was late, those of that kind come after all others.
    """

    name: str
    arguments: Mapping[str, Any]
    limit: float
    least: float
    group: str = ""
    kind: str = ""


def serve(function: str, plan: str, out: str) -> None:
    """The process of a group: writes the outcomes to ``out`` as they come."""
    status = _serve(function, plan, out)
    sys.stdout.flush()
    os._exit(status)  # what is kept is written, and CUDA and the compiler take long to take down


def _serve(function: str, plan: str, out: str) -> int:
    if sys.platform == "linux":  # else the jobs would outlive a benchmark that is killed
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    module, _, name = function.partition(":")
    content = json.loads(Path(plan).read_text())
    if os.getppid() != content["parent"]:  # it was killed meanwhile
        return 0
    end = time.monotonic() + content["seconds"]
    call = getattr(importlib.import_module(module), name)
    outcomes: list[dict[str, Any]] = []
    for job in content["jobs"]:
        began = time.monotonic()
        if end - began < job["least"]:
            outcome = _dropped(end - began, job["least"])
        else:
            print(job["name"], file=sys.stderr, flush=True)
            try:
                outcome = (header if job["name"] == HEADER else call)(**job["arguments"])
            except Exception as error:
                traceback.print_exc()
                outcome = {"failed": first_line(error)}
        outcomes.append(outcome | {"seconds": round(time.monotonic() - began, 2)})
        write(Path(out), {"outcomes": outcomes})
        if any(key in outcome for key in _SPOILED):
            return _SPOILED_STATUS
    return 0


def _dropped(left: float, least: float) -> dict[str, Any]:
    return {"dropped": f"{max(left, 0):.0f} s were left, it needs {least:.0f}"}


class Results:
    """A file of results with a row per job, written anew with every outcome.

    {"name", "header", "rows": what each job was asked, with its outcome}; a job that was not done
    has "dropped" and why. Its first job is HEADER.

    Args:
        name: of the set of results; the file is ``NAME_DEVICE_DATE.json`` in $OUT or in results/.
        jobs: all of them.
        settings: added to the header.
        describe: an outcome in a line.
        path: another file; False for none.
    """

    def __init__(
        self,
        name: str,
        jobs: Sequence[Job],
        settings: Mapping[str, Any],
        describe: Callable[[Mapping[str, Any]], str],
        path: Path | Literal[False] | None = None,
    ) -> None:
        self.name, self.settings, self.describe, self.path = name, settings, describe, path
        self.header: dict[str, Any] = {}
        self._rows = {
            job.name: dict(job.arguments) | {"dropped": "it was not reached"}
            for job in jobs
            if job.name != HEADER
        }

    @property
    def rows(self) -> list[dict[str, Any]]:
        return list(self._rows.values())

    def content(self) -> dict[str, Any]:
        return {"name": self.name, "header": self.header, "rows": self.rows}

    def keep(self, job: Job, outcome: dict[str, Any]) -> None:
        if job.name == HEADER:
            if "device" not in outcome:
                raise SystemExit(f"{self.name}: the device cannot be used: {outcome}")
            self.header = {**outcome, **self.settings}
            if self.path is None:
                self.path = results_path(self.name, self.header)
            words = ("device", "driver", "torch", "triton", "commit", "date", *self.settings)
            print("; ".join(f"{word} {self.header.get(word)}" for word in words), flush=True)
        else:
            self._rows[job.name] = dict(job.arguments) | outcome
            text = self.describe(outcome)
            print(f"{job.name}: {text}, {outcome.get('seconds', 0):.0f} s", flush=True)
        if self.path:
            write(self.path, self.content())


class _Watch:
    """Hands on the outcomes of a process as they appear, and tells when a job is late."""

    def __init__(
        self, out: Path, jobs: Sequence[Job], keep: Callable[[Job, dict[str, Any]], None]
    ) -> None:
        self.out, self.jobs, self.keep = out, jobs, keep
        self.done, self.since = 0, time.monotonic()
        self.late = False

    def look(self) -> None:
        if not self.out.exists():
            return
        outcomes = json.loads(self.out.read_text())["outcomes"]
        for outcome in outcomes[self.done :]:
            self.keep(self.jobs[self.done], outcome)
            self.done, self.since = self.done + 1, time.monotonic()

    def give_up(self) -> str | None:
        self.look()
        if self.done < len(self.jobs) and (
            time.monotonic() - self.since > self.jobs[self.done].limit
        ):
            self.late = True
            return f"no end after {self.jobs[self.done].limit:.0f} s"
        return None


def run_jobs(
    function: str,
    jobs: Sequence[Job],
    seconds: float,
    keep: Callable[[Job, dict[str, Any]], None],
    *,
    environment: Mapping[str, str],
    arguments: Callable[[Job], Mapping[str, Any]] = lambda job: job.arguments,
) -> None:
    """Does the jobs in their order for ``seconds`` in all; ``keep`` gets each outcome at once.

    An outcome is what the function returned, or ``{"failed": why}``, with "seconds", the time of
    the job; or ``{"dropped": why}`` for a job for which too little time was left.

    Args:
        environment: of the processes.
        arguments: of a job whose process is about to start, where they depend on other outcomes.
    """
    end = time.monotonic() + seconds
    todo, late = list(jobs), set[str]()
    while todo:
        todo.sort(key=lambda job: job.kind in late)  # stable
        left = end - time.monotonic()
        if left < todo[0].least:
            job = todo.pop(0)
            keep(job, _dropped(left, job.least))
            continue
        group = list(itertools.takewhile(lambda job: job.group == todo[0].group, todo))
        with tempfile.TemporaryDirectory() as folder:
            plan, out = Path(folder) / "plan.json", Path(folder) / "outcomes.json"
            calls = [
                {"name": job.name, "least": job.least, "arguments": dict(arguments(job))}
                for job in group
            ]
            write(plan, {"parent": os.getpid(), "seconds": left, "jobs": calls})
            watch = _Watch(out, group, keep)
            reason = processes.run(
                [sys.executable, "-c", _CODE, function, str(plan), str(out)],
                left,
                environment=environment,
                grace=_GRACE,
                give_up=watch.give_up,
            )
            watch.look()
        if watch.done < len(group) and reason != f"exit status {_SPOILED_STATUS}":
            job = group[watch.done]
            if watch.late and job.kind:
                late.add(job.kind)
            if time.monotonic() >= end:
                reason = "the time of all jobs was over"
            spent = round(time.monotonic() - watch.since, 2)
            keep(job, {"failed": reason or "the process ended early", "seconds": spent})
            watch.done += 1
        del todo[: watch.done]
