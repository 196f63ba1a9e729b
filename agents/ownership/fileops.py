"""Small files on a storage server: made whole and durable, read whole, asked again where the server wants that.

Law: everything here blocks, belongs in a worker thread, and raises nothing but OSError. A call is repeated only where
that can do no harm: what may have taken effect the first time is found out by looking, never assumed. Nothing looks at
a time stamp, and no clock is read.

Source: link(2) (EEXIST), open(2) on O_EXCL and NFS, fsync(2), close(2); RFC 1813, 3.3.15 (LINK).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

__all__ = [
    "TRIES",
    "discard",
    "is_refusal",
    "link_new",
    "make_folder",
    "names_in",
    "read_small",
    "resolve",
    "sync_folder",
    "write_new",
]

# An ESTALE is over with the next lookup, or stays until somebody mounts anew: more tries find nothing else. The callers
# wait and ask again where that makes sense (`migrate.doubt`).
TRIES: Final = 3
_PASSING: Final = frozenset({errno.ESTALE, errno.EINTR})
# What only a server that looked at the call and made nothing of it says. EIO and ETIMEDOUT are not among them: they
# tell of an answer that did not come.
_REFUSALS: Final = frozenset(
    {errno.EACCES, errno.EDQUOT, errno.EMLINK, errno.ENAMETOOLONG, errno.ENOSPC, errno.EPERM, errno.EROFS}
)

_T = TypeVar("_T")


def _again(call: Callable[[], _T]) -> _T:
    """Make a call that may be repeated, `TRIES` times in all, with fresh lookups after ESTALE and EINTR."""
    for _ in range(TRIES - 1):
        try:
            return call()
        except OSError as exc:
            if exc.errno not in _PASSING:
                raise
    return call()


def make_folder(folder: Path) -> None:
    """Make a folder that may be there already; the one above it must be."""

    def make() -> None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o770)

    _again(make)


def write_new(folder: Path, prefix: str, content: bytes) -> Path:
    """Make a durable file of a random name that begins with `prefix`; nothing stays of a failure."""

    def write() -> Path:
        path = folder / f"{prefix}{secrets.token_hex(8)}"
        try:
            _write(path, content)
        except OSError:
            # Also of one that was not opened: the answer may have been lost, and not the file.
            discard(path)
            raise
        return path

    return _again(write)


def link_new(existing: Path, name: Path) -> None:
    """Give a file a second name, if nobody has taken that.

    Returning tells only that the name is taken now: by this call, by somebody else, or by an earlier try of this call
    whose answer was lost. Reading it tells by whom.

    Raises:
        OSError: the world's; the name may have been made all the same, unless `is_refusal` says otherwise.
    """
    unsure: OSError | None = None
    for _ in range(TRIES):
        try:
            os.link(existing, name)
        except FileExistsError:
            return
        except OSError as exc:
            # The first try may still take effect, whatever is said of a later one: that stays the answer.
            unsure = unsure or exc
            if exc.errno not in _PASSING:
                break
        else:
            return
    if unsure is not None:
        raise unsure


def is_refusal(error: OSError) -> bool:
    """Say whether a server that gave this answer has decided against a call: it will not be done later either."""
    return error.errno in _REFUSALS


def read_small(path: Path, max_bytes: int) -> bytes:
    """Read a regular file up to `max_bytes`; a link, device or pipe in its place is refused, never waited for."""

    def read() -> bytes:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "is no regular file")
            content = b""
            while len(content) < max_bytes and (part := os.read(descriptor, max_bytes - len(content))):
                content += part
            return content
        finally:
            os.close(descriptor)

    return _again(read)


def names_in(folder: Path) -> list[str]:
    """Give what is in a folder: nothing where it was never made.

    Raises:
        FileNotFoundError: the folder above it is not there either: the storage is not mounted.
    """

    def names() -> list[str]:
        try:
            return os.listdir(folder)
        except FileNotFoundError as exc:
            if not _is_there(folder):
                os.stat(folder.parent)
                return []
            # A server that forgets a folder for a moment has not lost what is in it.
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE)) from exc

    return _again(names)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""

    def sync() -> None:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    _again(sync)


def discard(path: Path) -> None:
    """Take away what nothing depends on; if that fails every time it is litter."""
    for _ in range(TRIES):
        try:
            os.unlink(path)
        except FileNotFoundError:
            return
        except OSError:
            continue
        return


def resolve(path: Path) -> Path:
    """Give where a path leads, every link followed; its last part need not be there.

    Raises:
        OSError: a part of it cannot be looked at. What was not seen might be a link to elsewhere.
    """

    def look() -> Path:
        if _is_there(path):
            return Path(os.path.realpath(path, strict=True))
        return Path(os.path.realpath(path.parent, strict=True)) / path.name

    return _again(look)


def _is_there(path: Path) -> bool:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def _write(path: Path, content: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o640)
    try:
        left = memoryview(content)
        while left:  # a file system with little room left takes a part, and says so only at the next write
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
