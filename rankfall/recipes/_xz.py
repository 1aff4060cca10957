# SPDX-License-Identifier: Apache-2.0
"""Reading .xz files of any number of streams, and refusing what is damaged in any of them."""

import io
import lzma
from typing import Any, BinaryIO

_PIECE = 1 << 16  # Packed bytes that are read at once.


def open_xz(file: BinaryIO) -> io.BufferedReader:
    """The text of a packed file.

    `lzma.open` is not used: it takes a second stream that begins with damage for the end of the file.

    Args:
        file: The packed file; closing the text leaves it open.
    """
    return io.BufferedReader(_Streams(file), _PIECE)


class _Streams(io.RawIOBase):
    """The text of one stream after another."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._packed = b""
        self._stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)

    def readable(self) -> bool:
        """Yes; a buffered reader asks."""
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401  whatever bytes can be written to
        """Fills some of a buffer; 0 is the end of the last stream."""
        text = self._some(len(buffer))
        buffer[: len(text)] = text
        return len(text)

    def _some(self, most: int) -> bytes:
        text = b""
        while not text and (not self._stream.eof or self._goes_on()):
            if self._stream.needs_input and not self._packed:
                self._packed = self._file.read(_PIECE)
                if not self._packed:
                    raise EOFError("the file ends within an xz stream.")
            text, self._packed = self._stream.decompress(self._packed, most), b""
        return text

    def _goes_on(self) -> bool:
        """Whether anything but padding follows a stream; it must be a stream then."""
        self._packed = self._stream.unused_data.lstrip(b"\0")
        while not self._packed and (block := self._file.read(_PIECE)):
            self._packed = block.lstrip(b"\0")
        if self._packed:
            self._stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)
        return bool(self._packed)
