"""Byte streams: zstandard, lines of bounded length, and files behind URLs."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import zstandard

# maximum length of a line in a compressed file
LINE_BYTES = 1 << 28
# compressed input of one step; small, because the output can be ten thousand times as large
ZSTANDARD_BYTES = 4096


class ZstandardStream(io.RawIOBase):
    """Decompresses `data`, frame by frame. Raises EOFError for a truncated frame, which the
    library's reader does not detect.
    """

    def __init__(self, data: IO[bytes]) -> None:
        self._data, self._decompressor = data, zstandard.ZstdDecompressor(max_window_size=2**31)
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._data.read(ZSTANDARD_BYTES)
            if not self._input and self._frame is None:
                return 0
            if not self._input:
                raise EOFError("it ends in the middle of a compressed frame")
            self._frame = self._frame or self._decompressor.decompressobj()
            self._output, self._input = self._frame.decompress(self._input), b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        taken = min(len(buffer), len(self._output))
        buffer[:taken], self._output = self._output[:taken], self._output[taken:]
        return taken


class BoundedLines(io.RawIOBase):
    """Decompressed data with line breaks. Raises OSError for a longer line, because a small file
    could expand to a line that fills the memory.
    """

    def __init__(self, stream: Any) -> None:
        self._stream, self._length = stream, 0

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        last = data.rfind(b"\n")
        self._length = self._length + len(data) if last < 0 else len(data) - last - 1
        if self._length > LINE_BYTES:
            raise OSError(
                f"{LINE_BYTES >> 20} MiB without a line break: decompress it yourself if you trust "
                "it"
            )
        return len(data)

    def readable(self) -> bool:
        return True


class RemoteFile(io.RawIOBase):
    """A file behind a URL. Any exception of its client becomes an OSError."""

    def __init__(self, system: Any, path: str) -> None:
        with self._failing():
            self._data = system.open(path, "rb")
        self._in_any_order = "http" not in system.protocol or self._sends_parts()
        if not self._in_any_order:
            with self._failing():
                self._data = system.open(path, "rb", block_size=0)

    def readinto(self, buffer: Any) -> int:
        with self._failing():
            data = self._data.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with self._failing():
            return int(self._data.seek(offset, whence))

    def tell(self) -> int:
        return int(self._data.tell())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._in_any_order

    def close(self) -> None:
        if not self.closed:
            self._data.close()
        super().close()

    def _sends_parts(self) -> bool:
        """Whether a web server supports range requests, found by reading the last byte."""
        try:
            self._data.seek(-1, io.SEEK_END)
            self._data.read(1)
            self._data.seek(0)
        except Exception:
            return False
        return True

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise OSError(first_line(error)) from error


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
