"""Checkpoints that survive a kill at any moment, and the random states that go into them."""

import os
import random
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np
import torch


class CheckpointError(RuntimeError):
    """A checkpoint that is missing or cannot be read; the message names the file."""


class _Writer:
    """A file that remembers why it could not be written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.flush = file, file.flush
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


def save(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Writes ``state`` to ``path`` atomically: readers see the old file or the new one, whole.

    The bytes reach the disk under a temporary name before the rename, and the rename reaches it
    before this returns.

    Args:
        path: file to write; its directory must exist.
        state: nested dicts, lists and tuples of tensors, numbers, strings and None, as
            ``torch.load(weights_only=True)`` accepts.

    Raises:
        OSError: the file cannot be written (the disk is full, say); names it. What was there
            before is still there.
    """
    path = Path(path)
    # The process id keeps two writers apart; the leading dot keeps readers' globs away.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            writer = _Writer(file)
            try:
                torch.save(state, cast(IO[bytes], writer))
            except Exception:
                if writer.error is not None:  # which torch.save reports as one of its own
                    raise writer.error from None
                raise
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kept = "; the one written before is whole" if path.exists() else ""
        reason = f"cannot write the checkpoint: {error.strerror or error}{kept}"
        raise OSError(error.errno, reason, str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what :func:`save` wrote, with all tensors on the CPU. Runs no code from the file.

    Raises:
        CheckpointError: the file is missing, cut off or not a checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}") from None
    except Exception as error:  # torch.load raises half a dozen kinds, by where the damage lies
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"cannot read the checkpoint {path}: {reason}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is not a checkpoint: it holds a {type(state).__name__}")
    return state


def remove_temporaries(directory: str | os.PathLike[str]) -> None:
    """Deletes what killed writers left behind in ``directory``."""
    for temporary in Path(directory).glob(".*.pt.*.tmp"):
        temporary.unlink(missing_ok=True)


def rng_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and PyTorch's global generators, as plain values.

    Of CUDA generators, that of the current device.
    """
    version, internal, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)
    _, keys, position, has_gauss, cached = legacy
    return {
        "python": [version, list(internal), gauss],
        "numpy": [keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts the global generators back to what :func:`rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
