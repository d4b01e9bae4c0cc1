"""Writing the files of token stores: whole or not at all, and by one process at a time."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from lm.data.sources import DataError
from lm.files import atomic_write_bytes, explain_os_error


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write `path` whole or not at all.

    Raises:
      DataError: the folder cannot be written or the disk is full.
    """
    try:
        atomic_write_bytes(path, data)
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> DataError:
    """What to tell somebody whose token store at `path` could not be written."""
    return DataError(
        f"cannot write the token store {path}: {explain_os_error(error)}; make room there or "
        "choose another folder with data.cache or $ANISO_CACHE"
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the right to build `folder`, against other processes and hosts of the file system.

    The kernel frees it when the process dies, so a killed build blocks nobody.
    """
    import fcntl

    path = folder.with_name(folder.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = open(path, "a")
    except OSError as error:
        raise unwritable(path, error) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that builds {folder}", file=sys.stderr)
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            raise DataError(
                f"{path.parent} is on a file system without file locks ({error.strerror}); choose "
                "another folder with data.cache or $ANISO_CACHE"
            ) from error
        yield
