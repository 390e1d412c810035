"""The weights of a folder into the system's file cache, while Python imports torch and transformers."""

import contextlib
import threading
from pathlib import Path

import psutil

BLOCK_BYTES = 1 << 22


def read_ahead(folder: str) -> None:
    """Reads the weight files of a folder on a thread, so that a conversion finds them in memory.

    The imports take 10 s and more, in which the disk has nothing to do. Nothing is read that is larger than the free
    memory, from which it would be pushed out again.
    """
    with contextlib.suppress(OSError):  # told when the folder is opened for its tensors
        found = sorted(Path(folder).glob("*.safetensors")) or sorted(Path(folder).glob("*.bin"))
        files = [path for path in found if path.is_file()]
        if sum(path.stat().st_size for path in files) < psutil.virtual_memory().available:
            threading.Thread(target=_read, args=(files,), daemon=True).start()


def _read(files: list[Path]) -> None:
    block = bytearray(BLOCK_BYTES)
    with contextlib.suppress(OSError):
        for path in files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(block):
                    pass
