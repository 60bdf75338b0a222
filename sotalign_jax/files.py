"""How every floor writes files: under another name first, so that half of one is never seen; and
how processes keep out of each other's way."""

import contextlib
import errno
import functools
import os
import shutil
import uuid
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = [
    "check_absent",
    "flush_files",
    "lock",
    "new_directory",
    "replace_text",
    "replace_text_parts",
]


def replace_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file beside its place, then renames it over what stood there.

    Whatever happens on the way, under ``path`` is the whole of the old file or of the new one.

    Args:
        path: the file, in a directory that exists; the temporary file is hidden beside it.
        text: its contents, written as UTF-8.

    Raises:
        OSError: the file cannot be written; what stood there is untouched.
    """
    replace_text_parts(path, [text])


def replace_text_parts(path: str | os.PathLike, parts: Iterable[str]) -> None:
    """`replace_text` of a text that is made part by part, and not held.

    Args:
        path: the file, in a directory that exists; the temporary file is hidden beside it.
        parts: its contents, one after another; what they raise leaves everything as it was.

    Raises:
        OSError: the file cannot be written; what stood there is untouched.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())  # or a power loss may leave the new name on an empty file
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def flush_files(directory: str | os.PathLike) -> None:
    """Sends the files of a directory to the disk, before the directory is renamed into place.

    Args:
        directory: its own files; those of directories in it are left to the caller.

    Raises:
        OSError: a file cannot be opened or synchronised.
    """
    for path in Path(directory).iterdir():
        if path.is_dir():
            continue
        with open(path, "r+b") as file:  # some systems synchronise only what may be written
            os.fsync(file.fileno())


@contextlib.contextmanager
def new_directory(path: str | os.PathLike, name: str = "out") -> Iterator[Path]:
    """A directory that is there once it is whole: filled under another name, then renamed.

    Args:
        path: what it will be called; parents are made.
        name: what errors call it.

    Yields:
        A directory to fill, beside that. It is removed again where filling it fails.

    Raises:
        ValueError: something stands there already, before or after the filling.
        OSError: it cannot be written.
    """
    path = Path(path)
    check_absent(path, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        yield partial
        for folder in (partial, *(entry for entry in partial.rglob("*") if entry.is_dir())):
            flush_files(folder)
        check_absent(path, name)
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_absent(path: str | os.PathLike, name: str = "out", what: str = "directory") -> None:
    """Raises a ValueError that calls it ``name`` where something stands under a path."""
    if Path(path).exists():
        raise ValueError(f"{name}: {path} exists; give another {what} or remove it")


@contextlib.contextmanager
def lock(path: Path, *, shared: bool = False) -> Iterator[bool]:
    """Holds a lock file inside a ``with``; it ends with the process at the latest.

    Args:
        path: the file, made if absent.
        shared: others may hold it shared at the same time.

    Yields:
        False where another process holds it. True on systems without such locks; of a disk without
        them there is a warning.

    Raises:
        OSError: the file cannot be made, or the disk failed to lock it.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield True
        return
    # For reading too: over NFS a shared lock needs it.
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):
                why = f"cannot be locked: {error.strerror}"
                raise OSError(error.errno, why, str(path)) from error
            _warn_of_no_locks()
        yield True


@functools.cache
def _warn_of_no_locks() -> None:
    warnings.warn(
        "workdir: its disk has no file locks; start no two processes on the same work (of a sweep, "
        "give each its own part by --shard; of an encoding, by --shards)",
        stacklevel=2,
    )
