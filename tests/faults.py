"""Work in a forked child of a warm process, and file operations that fail on demand: the tools of the fault tests.

A fork spares the seconds of importing torch, so that a process can be killed, or a disk be full, hundreds of times.
"""

import builtins
import errno
import io
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

KILL = "kill"
FAULTS = (KILL, errno.ENOSPC, errno.EIO)
CALLS = ("open", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "link", "symlink", "truncate", "ftruncate")


class FileOperations:
    """Counts the operations that change files below ``root``, and makes the Nth fail: the process killed, or an error.

    What Python calls is counted: opening to write, each write, the close that flushes, fsync, rename, mkdir, unlink, …
    """

    def __init__(self, root: Path, nth: int | None = None, fault: int | str = KILL) -> None:
        self.root, self.nth, self.fault, self.seen = str(root), nth, fault, []
        self.lasting = False  # whether all after the Nth fail as well

    def happen(self, what: str, path: object = None) -> None:
        """Note an operation; fail if it is the one."""
        self.seen.append(f"{what} {path}")
        if len(self.seen) == self.nth or (self.lasting and len(self.seen) > self.nth):
            if self.fault == KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(self.fault, os.strerror(self.fault), *([str(path)] if path else []))

    def _concerns(self, path: object) -> bool:
        if isinstance(path, int):
            try:
                path = Path(f"/proc/self/fd/{path}").readlink()
            except OSError:
                return True
        return str(Path(path).absolute()).startswith(self.root)

    @contextmanager
    def watched(self) -> Any:
        """Count, and fail, within the block."""
        genuine = {name: getattr(os, name) for name in CALLS}
        genuine_open = builtins.open

        def watch(name: str) -> Callable:
            def call(path: Any, *args: Any, **kwargs: Any) -> Any:
                reading = name == "open" and not (args[0] if args else 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                if not reading and self._concerns(path):
                    self.happen(name, path if not isinstance(path, int) else None)
                return genuine[name](path, *args, **kwargs)

            return call

        def open_watched(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            writing = set(mode) & set("wax+") and not isinstance(file, int) and self._concerns(file)
            if writing:
                self.happen("open", file)
            opened = genuine_open(file, mode, *args, **kwargs)
            return _WatchedFile(opened, self, file) if writing else opened

        for name in CALLS:
            setattr(os, name, watch(name))
        builtins.open = io.open = open_watched
        try:
            yield self
        finally:
            for name in CALLS:
                setattr(os, name, genuine[name])
            builtins.open = io.open = genuine_open


class _WatchedFile:
    """A file being written, whose writes and whose close are operations."""

    def __init__(self, file: Any, operations: FileOperations, path: object) -> None:
        self._file, self._operations, self._path = file, operations, path

    def write(self, content: Any) -> int:
        self._operations.happen("write", self._path)
        return self._file.write(content)

    def close(self) -> None:
        if not self._file.closed:
            try:
                self._operations.happen("close", self._path)
            finally:
                self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __iter__(self) -> Any:
        return iter(self._file)

    def __enter__(self) -> "_WatchedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start(action: Callable[[], object], log: Path | None = None) -> int:
    """Run ``action`` in a forked child, what it prints in ``log``; gives its process number.

    It exits with what ``action`` gives (None: 0), with the code of its SystemExit, or with 99 after a traceback. Its
    global random generators start anywhere: nothing may hang on them.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    chaos = random.getrandbits(32)
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        if log is not None:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            sys.stderr = os.fdopen(2, "w", closefd=False)
        if torch := sys.modules.get("torch"):
            torch.manual_seed(chaos)
        random.seed(chaos)
        code = action() or 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def here(action: Callable[[], object], log: Path) -> int:
    """Run ``action`` in this process, what it prints in ``log``; how it would have ended a process."""
    with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            return action() or 0
        except SystemExit as end:
            return end.code or 0
        except BaseException:
            traceback.print_exc()
            return 99


def wait(pid: int) -> int:
    """How a child ended: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fork(action: Callable[[], object], log: Path | None = None) -> int:
    """Run ``action`` in a forked child to its end."""
    return wait(start(action, log))


def leftovers(directory: Path) -> list[str]:
    """What writers that did not come to their end left behind."""
    marks = (".tmp-", ".dead-", ".bad-")
    return sorted(str(path.relative_to(directory)) for path in directory.rglob(".*") if path.name.startswith(marks))
