"""The output folder as a transaction: built beside its place, flushed, renamed; or not there at all."""

import contextlib
import errno
import glob
import json
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from delta_llava.errors import UserError
from modeling_delta_llava.conversion.tensors import format_bytes
from modeling_delta_llava.conversion.writer import flush
from modeling_delta_llava.folders import check_output_folder, holds_model

_OWNER_FILE = ".owner.json"
# Left free on the disk beside what is written.
RESERVE_BYTES = 64_000_000


@contextlib.contextmanager
def interruptible(output: Path) -> Iterator[None]:
    """SIGINT and SIGTERM end the block, its cleaning up included, with one line for the user.

    Raises:
        UserError: the block was interrupted.
    """

    def interrupt(_number, _frame):
        raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, interrupt) if in_main_thread else None
    try:
        yield
    except KeyboardInterrupt as error:
        raise UserError(f"interrupted: nothing was kept of OUTPUT {output}; run the same command again") from error
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)


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
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"OUTPUT {output} is a file or link: a folder is expected, choose another name")
    is_ours = not overwrite or holds_model(output)
    check_output_folder(output, f"OUTPUT {output}", "holds no model: it is not replaced", is_ours, replaces=True)
    if output.exists() and not overwrite:
        raise UserError(f"OUTPUT {output} exists: pass --overwrite to replace it, or choose another folder")
    for parent in output.absolute().parents:
        if parent.exists():
            if not parent.is_dir():
                raise UserError(f"{parent} is a file: OUTPUT {output} needs a folder there")
            if not os.access(parent, os.W_OK | os.X_OK):
                raise UserError(f"no permission to write in {parent}: choose another OUTPUT")
            return


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


@contextlib.contextmanager
def transaction(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside `output` that takes its place when the block ends without an error.

    Whatever is raised inside the block, KeyboardInterrupt too, the folder is removed and `output` is as it was.
    After SIGKILL it stays under a hidden name that nothing mistakes for a model; the next run removes it.

    Raises:
        UserError: no permission or no space, in one line.
    """
    output = output.absolute()
    created = _make_parents(output.parent)
    try:
        remove_leftovers(output)
        building = output.parent / f".{output.name}.building-{os.getpid()}"
        building.mkdir()
        finished = False
        try:
            (building / _OWNER_FILE).write_text(json.dumps(_own_identity()), encoding="utf-8")
            yield building
            (building / _OWNER_FILE).unlink()
            _flush_tree(building)
            _take_place(building, output, overwrite)
            finished = True
        finally:
            if not finished:
                shutil.rmtree(building, ignore_errors=True)
    except BaseException as error:
        for folder in created:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, PermissionError):
            place = str(error.filename or output)
            if _is_written(place, output):
                raise UserError(f"no permission to write {place}: choose another OUTPUT") from error
            raise UserError(f"{place} cannot be read ({error.strerror}): check its permissions") from error
        if isinstance(error, OSError) and error.errno == errno.EFBIG:
            raise UserError(
                f"the disk of OUTPUT {output} takes no files of this size: nothing was kept; pass a smaller "
                "--max-shard-size or choose another disk"
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk of OUTPUT {output} is full: nothing was kept; free some and run again"
            ) from error
        raise


def _is_written(place: str, output: Path) -> bool:
    """Whether a transaction writes there: the folder around OUTPUT, OUTPUT, or what stands for it beside it."""
    beside = str(output.parent / f".{output.name}.")
    return place == str(output.parent) or f"{place}/".startswith((f"{output}/", beside))


def _take_place(building: Path, output: Path, overwrite: bool) -> None:
    # The name says who did it: what is inside is the user's and stays as it is.
    me = os.getpid()
    replaced = output.parent / f".{output.name}.replaced-{me}-{_start_time(me) or ''}"
    if output.exists():
        if not overwrite:
            raise UserError(f"OUTPUT {output} appeared meanwhile: it is left alone, choose another folder")
        try:
            os.rename(output, replaced)
            os.rename(building, output)
        except BaseException:
            if replaced.exists() and not output.exists():
                os.rename(replaced, output)
            raise
        flush(output.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        os.rename(building, output)
        flush(output.parent)


def remove_leftovers(output: Path) -> None:
    """Removes what a killed run left beside `output`; puts a replaced folder back if its successor never came."""
    name = glob.escape(output.name)
    for path in sorted(output.parent.glob(f".{name}.replaced-*")):
        pid, _, started = path.name.rpartition(".replaced-")[2].partition("-")
        if not _process_runs({"pid": int(pid) if pid.isdigit() else 0, "started": started or None}):
            if output.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.rename(path, output)
    for path in output.parent.glob(f".{name}.building-*"):
        try:
            owner = json.loads((path / _OWNER_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            owner = {"pid": _trailing_number(path)}
        if not _process_runs(owner):
            shutil.rmtree(path, ignore_errors=True)


def _trailing_number(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdigit() else 0


def _own_identity() -> dict[str, object]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": _start_time(os.getpid())}


def _start_time(pid: int) -> str | None:
    """When a process started, in the kernel's own count: tells two processes of one number apart."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _process_runs(owner: dict[str, object]) -> bool:
    pid = owner.get("pid")
    if owner.get("host", socket.gethostname()) != socket.gethostname():
        return True
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return owner.get("started") is None or owner["started"] == _start_time(pid)


def _make_parents(folder: Path) -> list[Path]:
    """Creates `folder` and returns what had to be created, innermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    try:
        for path in reversed(missing):
            path.mkdir()
    except PermissionError as error:
        raise UserError(f"no permission to create {error.filename}: choose another OUTPUT") from error
    return missing


def _flush_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if not path.name.endswith(".safetensors"):  # the writer flushed those
            flush(path)
    flush(folder)
