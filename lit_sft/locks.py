"""Who may write a directory: a lock that dies with its process."""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from lit_sft.errors import InputError

LOCK = ".lock"


@contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Hold ``directory`` for this process; InputError names the holder. The lock dies with its process."""
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory / LOCK) as file:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _locked(path: Path) -> TextIO:
    """The lock's file, open and locked; it may come from anywhere, and be removed by who held it before."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
                raise
            raise InputError(f"{path} is no plain file; remove it") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise InputError(f"{path} is no plain file; remove it")
        file = os.fdopen(descriptor, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise InputError(f"{path.parent} is in use by process {holder}; wait, or name another") from None
        except BaseException:
            file.close()
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return file
        file.close()  # whoever held it has removed it
