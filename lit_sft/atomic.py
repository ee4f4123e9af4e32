"""Files and directories that are complete or absent: write aside, fsync, rename, manifest last."""

import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lit_sft import __version__
from lit_sft.documents import read_bytes
from lit_sft.errors import InputError, NewerFormat
from lit_sft.layout import MANIFEST
from lit_sft.redact import command_line

FORMAT_VERSION = 1


def fsync(path: Path) -> None:
    """Flush a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file's name beside ``path``; when the block ends well, what was written there becomes ``path``.

    What was there stays otherwise. InputError when the disk refuses.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        for leftover in _left_by_the_dead(path, ".tmp"):
            leftover.unlink()
        yield temporary
        fsync(temporary)
        temporary.rename(path)
        fsync(path.parent)
    except OSError as error:  # a write that fails does not know its file's name
        what = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room").get(error.errno, "mend that")
        raise InputError(
            f"{path} cannot be written: {error.strerror or error}; {what}, or name another folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Give ``path`` this content, or leave what was there."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def replaceable(directory: Path, kind: str) -> bool:
    """Whether ``directory`` may be written: absent, empty, or an earlier result of the same kind."""
    if not directory.is_dir():
        return not directory.exists()
    if not any(directory.iterdir()):
        return True
    try:
        return Manifest.read(directory).kind == kind
    except NewerFormat:
        raise
    except InputError:
        return False


def _alive(pid: int) -> bool:
    """Whether another process has this number: ours is not writing yet."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _left_by_the_dead(path: Path, prefix: str) -> list[Path]:
    """What writers of ``path`` that were killed left beside it, under its name between ``prefix`` and their number."""
    found = path.parent.glob(f"{prefix}-{glob.escape(path.name)}-*")
    return [f for f in found if (pid := f.name.rpartition("-")[2]).isdecimal() and not _alive(int(pid))]


@contextmanager
def publish_directory(final: Path, kind: str) -> Iterator[Path]:
    """Yield an empty directory that becomes ``final`` when the block ends well, and vanishes when it does not.

    An earlier result of the same ``kind`` is replaced; anything else in the way raises InputError beforehand.
    """
    final = final.resolve()
    if not replaceable(final, kind):
        raise InputError(f"{final} exists and is not a {kind} directory of lit_sft; remove it or name another")
    temporary = final.with_name(f".tmp-{final.name}-{os.getpid()}")
    for leftover in _left_by_the_dead(final, ".dead"):
        recover(leftover)
    for leftover in _left_by_the_dead(final, ".tmp"):
        shutil.rmtree(leftover)
    old = final.with_name(f".dead-{final.name}-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in (*sorted(temporary.rglob("*")), temporary):
            fsync(path)
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        fsync(final.parent)
    finally:
        if old.exists() and not final.exists():  # stopped between the two renames
            old.rename(final)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def renewing(directory: Path, pattern: str) -> Iterator[Path]:
    """Yield an empty folder; its files join ``directory`` when the block ends well, in place of those like ``pattern``.

    For a directory that holds more than the result, whose lock is held. The manifest goes first and comes last: killed
    between, it counts as unwritten.
    """
    for leftover in directory.glob(".tmp-renewing-*"):
        shutil.rmtree(leftover)
    folder = directory / f".tmp-renewing-{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
        names = sorted((path.name for path in folder.iterdir()), key=lambda name: (name == MANIFEST, name))
        old = {path.name for path in directory.glob(pattern)}
        if odd := sorted(name for name in old.union(names) if (directory / name).is_dir()):
            raise InputError(f"{directory / odd[0]} is a folder, and in the way of what is written; move it away")
        (directory / MANIFEST).unlink(missing_ok=True)
        fsync(directory)
        for leftover in old - set(names):
            (directory / leftover).unlink()
        for name in names:
            if name == MANIFEST:
                fsync(directory)
            (folder / name).rename(directory / name)
        fsync(directory)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def recover(dead: Path) -> None:
    """Give what was moved out of the way by a writer that died its name back, if nothing took its place since."""
    name, _, pid = dead.name.removeprefix(".dead-").rpartition("-")
    if not name or not pid.isdecimal() or _alive(int(pid)):
        return
    shutil.rmtree(dead) if dead.with_name(name).exists() else dead.rename(dead.with_name(name))


def discard(directory: Path) -> None:
    """Delete a directory; its name is given up first, so that what a kill leaves of it is swept, never read."""
    dead = directory.with_name(f".tmp-{directory.name}-{os.getpid()}")
    directory.rename(dead)
    _remove(dead)


def _remove(path: Path) -> None:
    """Delete whatever it is; of a link only the link."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def sweep(parent: Path) -> None:
    """Remove what killed writers left in ``parent``; call it only while holding the lock of that directory."""
    for leftover in parent.glob(".dead-*"):
        recover(leftover)
    for leftover in parent.glob(".tmp-*"):
        _remove(leftover)


@dataclass
class Manifest:
    """What a directory is and holds: written last, checked by the next command."""

    kind: str
    facts: dict
    files: dict[str, dict] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    lit_sft_version: str = __version__
    command: str = field(default_factory=lambda: command_line())
    digest: str | None = None
    """sha256 of kind, facts and files: a flipped bit here would be believed."""

    def write(self, directory: Path, names: Iterable[str], hashes: dict[str, str] | None = None) -> None:
        """Record the files ``names`` of ``directory`` (size, sha256; ``hashes``: those already known), then itself."""
        for name in sorted(names):
            digest = (hashes or {}).get(name) or sha256_of(directory / name)
            self.files[name] = {"bytes": (directory / name).stat().st_size, "sha256": digest}
        self.digest = self.digest_now()
        write_atomically(directory / MANIFEST, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, directory: Path, kind: str | None = None) -> "Manifest":
        """The manifest of ``directory``; InputError when absent, unreadable, of a newer format or another kind."""
        path = directory / MANIFEST
        try:
            content = json.loads(read_bytes(path).decode())
            newer = isinstance(content, dict) and content.get("format_version", 0) > FORMAT_VERSION
            manifest = None if newer else cls(**content)
            if not newer and (why := manifest._problem()):
                raise TypeError(why)
        except FileNotFoundError:
            raise InputError(f"{path} is missing: the directory is incomplete; write it again") from None
        except (ValueError, TypeError, RecursionError) as error:
            why = " ".join(str(error).split())
            raise InputError(f"{path} is not a manifest of this lit_sft ({why}); write the directory again") from None
        if newer:
            format_version = content["format_version"]
            raise NewerFormat(f"{path} has format {format_version}, newer than {FORMAT_VERSION}; update lit_sft")
        if kind is not None and manifest.kind != kind:
            raise InputError(f"{directory} is a {manifest.kind} directory, not a {kind} directory")
        return manifest

    def digest_now(self) -> str:
        """What ``digest`` is to be for what is there now."""
        read = json.loads(json.dumps([self.kind, self.facts, self.files]))  # whose keys are text
        return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()

    def _problem(self) -> str | None:
        """What in its fields cannot be: the file may come from anywhere."""
        types = {"kind": str, "facts": dict, "files": dict, "format_version": int}
        if wrong := [name for name, kind in types.items() if not isinstance(getattr(self, name), kind)]:
            return f"its {wrong[0]} is {getattr(self, wrong[0])!r}"
        for name, fact in self.files.items():
            inside = name and not Path(name).is_absolute() and ".." not in Path(name).parts and "\0" not in name
            if not inside:
                return f"it names {name!r}, which is no file of its directory"
            known = isinstance(fact, dict) and type(fact.get("bytes")) is int and isinstance(fact.get("sha256"), str)
            if not known:
                return f"it has no bytes and sha256 of {name}"
        if self.digest not in (None, self.digest_now()):  # None: written by hand
            return "it differs from its own digest"
        return None

    def check_files(self, directory: Path) -> None:
        """Require every recorded file, its size and its sha256; InputError names the first that differs."""
        for name in self.files:
            self.check_file(directory, name)

    def check_file(self, directory: Path, name: str, hashed: bool = True) -> None:
        """Require the recorded file ``name``, its size and, if ``hashed``, its sha256; InputError says what differs."""
        path, fact = directory / name, self.files[name]
        if not path.is_file():
            raise InputError(f"{path} is missing; write {directory} again")
        if path.stat().st_size != fact["bytes"]:
            raise InputError(f"{path} has {path.stat().st_size} bytes, not {fact['bytes']}: damaged; write it again")
        if hashed and sha256_of(path) != fact["sha256"]:
            raise InputError(f"{path} differs from its recorded sha256: damaged; write {directory} again")
