# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent: written beside their place, flushed to the disk, then renamed; and the cache."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def write_atomic(path: Path | str, write: Callable[[Path], object]) -> None:
    """Writes a file so that an interruption at any moment leaves the old file, or the new one, whole.

    `write` fills a temporary file in the same folder; it is then flushed to the disk (fsync), renamed over `path`,
    and the rename itself is flushed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomic(Path(folder) / "a.txt", lambda p: p.write_text("whole"))
        ...     (Path(folder) / "a.txt").read_text()
        'whole'

    Args:
        path: Where the file shall stand; its folder must exist.
        write: Called with the temporary path.

    Raises:
        OSError: If it cannot be written; it names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # As readable as any new file, whatever the writer (or tempfile, for which private is the rule) makes of it.
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)
        _flush(temporary)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            # Who writes to a full disk does not say where.
            named = (f"{path}: {error}",) if error.errno is None else (error.errno, error.strerror, str(path))
            raise OSError(*named) from error
        raise
    _flush(path.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache_folder() -> Path:
    """The folder rankfall of XDG_CACHE_HOME, or of ~/.cache; it need not exist.

    Raises:
        RuntimeError: If there is no home.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankfall"
