"""Folders that commands write: whole or not there at all, and never in place of what is not theirs."""

import contextlib
import errno
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from delta_llava.errors import UserError, reason

from .json_files import read_json

# Left free on the disk beside what is written.
RESERVE_BYTES = 64_000_000


def check_output_folder(folder: Path, label: str, stranger: str, is_ours: bool, replaces: bool = False) -> None:
    """Refuses a folder that a command must not write into; links and `..` are followed.

    Nothing goes into a root or a home folder. Nothing goes into a mount point, the root of a git checkout or a folder
    that holds anything, unless what it holds is ours; and the first two are never replaced.

    Args:
        label: how messages call it (`OUTPUT name`).
        stranger: what messages say of a folder that is not ours ("holds no model").
        is_ours: whether the command may change what the folder holds.
        replaces: whether the command removes the folder first.

    Raises:
        UserError: one line that names the folder and what it is.
    """
    place = Path(os.path.realpath(folder))
    if place.parent == place:
        problem = "is the root folder"
    elif place == Path(os.path.realpath(os.path.expanduser("~"))):
        problem = "is your home folder"
    elif os.path.ismount(place) and (replaces or not is_ours):
        problem = "is a mount point"
    elif os.path.lexists(place / ".git") and (replaces or not is_ours):
        problem = "is the root of a git checkout"
    elif place.exists() and not place.is_dir():
        problem = "is a file"
    elif place.is_dir() and not is_ours and any(place.iterdir()):
        problem = f"exists and {stranger}"
    else:
        return
    raise UserError(f"{label} {problem}; give another folder")


def holds_model(folder: Path) -> bool:
    """Whether a folder holds what `convert`, `export` or training writes: ours to replace when that is asked for."""
    try:
        config = read_json(folder / "config.json")
    except UserError:
        config = {}
    ours = config.get("model_type") in ("delta_llava", "llava") or "mm_vision_tower" in config
    return ours or (folder / "mm_projector.bin").is_file()


def check_output(output: Path, inputs: dict[str, Path], overwrite: bool) -> None:
    """Refuses an OUTPUT that cannot be written, before anything is read.

    Args:
        inputs: what is read, by the name used in messages (`SOURCE`).
        overwrite: an existing OUTPUT may be replaced, if it holds a model.

    Raises:
        UserError: OUTPUT is one of the inputs, lies around one or inside one, exists, is a file, or is a place that
            must not be replaced.
    """
    place = output.resolve()
    for role, path in inputs.items():
        other = path.resolve()
        if place == other:
            raise UserError(f"OUTPUT {output} is {role} itself: choose another folder")
        if place in other.parents:
            raise UserError(f"OUTPUT {output} contains {role} {path}: choose another folder")
        if other in place.parents:
            raise UserError(f"OUTPUT {output} lies inside {role} {path}: choose another folder")
    if output.exists() and not output.is_dir():
        raise UserError(f"OUTPUT {output} is a file or link: a folder is expected, choose another name")
    is_ours = not overwrite or holds_model(output)
    check_output_folder(output, f"OUTPUT {output}", "holds no model: it is not replaced", is_ours, replaces=True)
    if output.is_symlink():
        raise UserError(f"OUTPUT {output} is a file or link: a folder is expected, choose another name")
    if output.exists() and not overwrite:
        raise UserError(f"OUTPUT {output} exists: pass --overwrite to replace it, or choose another folder")
    for parent in output.absolute().parents:
        if parent.exists():
            if not parent.is_dir():
                raise UserError(f"{parent} is a file: OUTPUT {output} needs a folder there")
            if not os.access(parent, os.W_OK | os.X_OK):
                raise UserError(f"no permission to write in {parent}: choose another OUTPUT")
            return


# --- space -----------------------------------------------------------------------------------------------------------


def format_bytes(count: float) -> str:
    """`13.5 GB`, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def free_bytes(path: Path) -> int:
    """Free space on the disk that holds `path` or the nearest folder above it."""
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free


def check_space(output: Path, needed: int) -> None:
    """Refuses to start what cannot end.

    Raises:
        UserError: the disk of `output` has less than `needed` bytes and a reserve.
    """
    free = free_bytes(output)
    if needed + RESERVE_BYTES > free:
        raise UserError(
            f"no space for OUTPUT {output}: {format_bytes(needed)} needed, {format_bytes(free)} free; "
            "free some or choose another disk"
        )


# --- all or nothing --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_folder(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder that takes the place of `output` when the block ends without an error.

    Whatever ends the block, SIGINT and SIGTERM included, `output` is then as it was. A killed process leaves a hidden
    folder beside it, which the next call for the same `output` removes: the lock inside, which the kernel drops with
    its process, says that nobody writes there any more.

    Args:
        output: the folder; folders above it are made, and removed again if the block fails.
        overwrite: `output` may exist, and is replaced.

    Raises:
        UserError: another process writes there, the block was interrupted, or no permission or space.
    """
    output = Path(os.path.abspath(output))
    unfinished = output.parent / f".{output.name}.unfinished"
    building, replaced = unfinished / "new", unfinished / "replaced"
    created: list[Path] = []
    finished = False
    try:
        with _interrupts_raise():
            created += _make_parents(unfinished)
            with _lock(unfinished, output):
                try:
                    if replaced.exists() and not output.exists():
                        os.rename(replaced, output)
                    if output.exists() and not overwrite:
                        raise UserError(f"OUTPUT {output} exists: it is left alone, choose another folder")
                    for left in (building, replaced):
                        shutil.rmtree(left, ignore_errors=True)
                    building.mkdir()
                    yield building
                    _flush(building)
                    with _interrupts_wait():
                        _take_place(building, output, replaced, overwrite)
                        finished = True
                        with contextlib.suppress(OSError):  # it is there, whatever the disk says of its name
                            _flush_one(output.parent)
                        shutil.rmtree(unfinished, ignore_errors=True)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
    except KeyboardInterrupt as error:
        if not finished:
            raise UserError(f"interrupted: nothing was kept of OUTPUT {output}; run the same command again") from error
    except OSError as error:
        if not finished:
            raise UserError(_why_not_written(error, output)) from error
    finally:
        if not finished:
            for folder in created:
                with contextlib.suppress(OSError):
                    folder.rmdir()


@contextlib.contextmanager
def _lock(unfinished: Path, output: Path) -> Iterator[None]:
    busy = f"another process is writing OUTPUT {output}: wait until it is done, or choose another folder"
    if unfinished.is_symlink():
        raise UserError(f"{unfinished} is a link: remove it")
    lock = FileLock(unfinished / "lock", blocking=False)
    try:
        lock.acquire()
    except (Timeout, FileNotFoundError):
        raise UserError(busy) from None
    try:
        yield
    finally:
        lock.release()


def _take_place(building: Path, output: Path, replaced: Path, overwrite: bool) -> None:
    if output.exists() or output.is_symlink():
        if not overwrite:
            raise UserError(f"OUTPUT {output} appeared meanwhile: it is left alone, choose another folder")
        os.rename(output, replaced)
    try:
        os.rename(building, output)
    except OSError:
        if replaced.exists():
            os.rename(replaced, output)
        raise


@contextlib.contextmanager
def _interrupts_raise() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as SIGINT does."""

    def interrupt(_number, _frame):
        raise KeyboardInterrupt

    with _handled(interrupt, signal.SIGTERM):
        yield


def _interrupts_wait() -> contextlib.AbstractContextManager[None]:
    """SIGINT and SIGTERM do nothing: what is nearly done is finished, and what is said about it is true."""
    return _handled(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def _handled(handler, *signals: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, handler_before in previous.items():
            signal.signal(number, handler_before)


def _make_parents(folder: Path) -> list[Path]:
    """Creates `folder` and returns what had to be created, innermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir()
    return missing


def _flush(folder: Path) -> None:
    """Waits until a folder and all that is in it are on disk."""
    for path in sorted(folder.rglob("*")):
        _flush_one(path)
    _flush_one(folder)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _why_not_written(error: OSError, output: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of OUTPUT {output} is full: nothing was kept; free some and run again"
    if error.errno == errno.EFBIG:
        return (
            f"the disk of OUTPUT {output} takes no files of this size: nothing was kept; pass a smaller "
            "--max-shard-size or choose another disk"
        )
    place = str(error.filename or output)
    if not f"{place}/".startswith((f"{output}/", f"{output.parent}/.{output.name}.")) and place != str(output.parent):
        return f"{place} cannot be read ({error.strerror}): nothing was kept; check its permissions and its disk"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to use {place}: nothing was kept; choose another OUTPUT"
    return f"OUTPUT {output} was not written, nothing was kept: {reason(error)}"
