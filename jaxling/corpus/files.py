"""Where the bytes of a corpus come from: files or URLs, listed, opened and unpacked."""

import glob
import gzip
import io
import pathlib
import zlib
from typing import Any, BinaryIO


def listed(source: str) -> list[str]:
    """The files of a path, directory, pattern or URL, in order; hidden ones left out.

    A directory that `jaxling.training.write_tokens` wrote stands for itself.

    Raises:
      ImportError: a URL without the extra `corpus`, or without what its scheme needs.
      ValueError: a scheme that nobody knows.
      OSError: it cannot be listed.
    """
    if "://" in source:
        filesystem, path = _fsspec().core.url_to_fs(source)
        if not any(c in path for c in "*?["):
            if not filesystem.isdir(path):
                return [source]
            path = path.rstrip("/") + "/**"
        found = sorted(filesystem.glob(path))
        return [
            filesystem.unstrip_protocol(name)
            for name in found
            if not filesystem.isdir(name) and not _hidden(name)
        ]
    place = pathlib.Path(source)
    if place.is_dir() and not _holds_tokens(place):
        found = list(place.rglob("*"))
    elif place.exists():
        return [source]
    else:
        found = [pathlib.Path(name) for name in glob.glob(source, recursive=True)]
    return sorted(
        str(path)
        for path in found
        if not _hidden(path.name)
        and (_holds_tokens(path) or path.is_file() and not _holds_tokens(path.parent))
    )


def _holds_tokens(place: pathlib.Path) -> bool:
    return (place / "tokens.json").exists()


def _hidden(name: str) -> bool:
    return name.rsplit("/", 1)[-1].startswith((".", "_"))


def opened(url: str) -> Any:
    """The file as bytes, to be closed.

    Raises:
      ImportError, ValueError, OSError: as `listed`; it cannot be opened.
    """
    if "://" not in url:
        return open(url, "rb")
    try:
        return _fsspec().open(url, "rb").open()
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file at {url}.") from None


def unpacked(url: str, raw: BinaryIO) -> Any:
    """What `raw` holds; its name says how it is packed, `.gz`, `.zst` or not at all.

    Raises:
      ImportError: `.zst` without the extra `corpus`.
    """
    if url.endswith(".gz"):
        return gzip.open(raw)
    if url.endswith(".zst"):
        return io.BufferedReader(_Frames(raw), 1 << 20)
    return raw


class _Frames(io.RawIOBase):
    """What the frames of a .zst file hold, one after another.

    The library's own reader takes a file that was cut for one that ends.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self.raw = raw
        # As far back as `zstd --long=31` refers.
        self.made = _zstandard().ZstdDecompressor(max_window_size=1 << 31)
        self.frame: Any = None
        self.packed, self.ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            self.packed = self.packed or self.raw.read(1 << 16)
            if not self.packed:
                if self.frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            self.frame = self.frame or self.made.decompressobj()
            self.ready = memoryview(self.frame.decompress(self.packed))
            self.packed = b""
            if self.frame.eof:
                self.packed, self.frame = self.frame.unused_data, None
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size


def damages() -> tuple[type[Exception], ...]:
    """What reading a damaged file raises; see `out_of_reach`."""
    known = (OSError, EOFError, zlib.error)
    try:
        return (*known, _zstandard().ZstdError)
    except ImportError:
        return known


def out_of_reach(error: Exception) -> bool:
    """Whether a disk or a network failed, and not the file: it may be read again."""
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    # Damage of gzip and Parquet is an OSError too, but none of the system's.
    return isinstance(error, OSError) and error.errno is not None


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise ImportError(
            "Reading .zst needs the extra `corpus`: pip install 'jaxling[corpus]'."
        ) from None
    return zstandard


def _fsspec() -> Any:
    try:
        import fsspec
    except ImportError:
        raise ImportError(
            "Reading URLs needs the extra `corpus`: pip install 'jaxling[corpus]'."
        ) from None
    return fsspec
