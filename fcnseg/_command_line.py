"""How a command ends: with its exit status, and quietly where nobody reads its output any more."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

BROKEN_PIPE = 128 + 13  # what a shell reports of a process that SIGPIPE ended
INTERRUPTED = 128 + 2  # and of one that Ctrl-C ended


class OutputClosed(SystemExit):
    """Standard output or standard error takes nothing more; ends the process where it is raised.

    No OSError, so that code which reports errors of its own files does not take it for one of them.
    """


class _Output(io.FileIO):
    """A standard stream; raises OutputClosed where its other end is gone or its disk is full."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            # What is still in buffers is flushed while the process ends. It must not fail again:
            # Python would report that, and change the exit status.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if isinstance(error, BrokenPipeError):
                raise OutputClosed(BROKEN_PIPE) from None
            text = f"error: the output cannot be written: {error.strerror}"
            raise OutputClosed(text) from None


def _guarded(stream: TextIO | None) -> TextIO:
    if stream is None:  # it was closed when the process started
        return open(os.devnull, "w")
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering or stream.write_through,
    )


def run(main: Callable[[], int | None]) -> NoReturn:
    """End the process with the exit status that ``main`` returns.

    Where the reader of the output has gone, as in ``command | head``, it ends at the next line,
    without a message, with the status that SIGPIPE gives. SIGPIPE itself stays ignored: it would
    also come from the pipes to worker processes, and would leave no time to end in order. Where the
    output cannot be written, because a disk is full, say, it ends with a message and status 1.
    """
    sys.stdout, sys.stderr = _guarded(sys.stdout), _guarded(sys.stderr)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
