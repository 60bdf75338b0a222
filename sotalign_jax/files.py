"""How every floor writes files: under another name first, so that half of one is never seen."""

import os
import uuid
from pathlib import Path

__all__ = ["flush_files", "replace_text"]


def replace_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file beside its place, then renames it over what stood there.

    Whatever happens on the way, under ``path`` is the whole of the old file or of the new one.

    Args:
        path: the file, in a directory that exists; the temporary file is hidden beside it.
        text: its contents, written as UTF-8.

    Raises:
        OSError: the file cannot be written; what stood there is untouched.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # or a power loss may leave the new name on an empty file
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def flush_files(directory: str | os.PathLike) -> None:
    """Sends the files of a directory to the disk, before the directory is renamed into place.

    Args:
        directory: holds files only.

    Raises:
        OSError: a file cannot be opened or synchronised.
    """
    for path in Path(directory).iterdir():
        with open(path, "r+b") as file:  # some systems synchronise only what may be written
            os.fsync(file.fileno())
