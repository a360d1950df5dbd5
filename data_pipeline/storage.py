"""Where a folder of files lies: on a disk, or behind a URL such as s3://bucket/shards.

    Folder.open("/data/shards")              read with `os.pread`
    Folder.open("s3://bucket/shards")        read through fsspec; gs://, memory:// and its other protocols too
    Folder.open("https://host/shards")       of a server that lists its folders and serves byte ranges

Endpoint and credentials of a URL are those of its usual tools (for S3 the AWS configuration: AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, ...); uvlm has no settings for them. An I/O error is tried again after each pause of RETRY_SECONDS,
then raised as an OSError that names file, bytes and cause. What is missing or forbidden is not tried again.

A folder may be pickled and used after a fork: connections belong to the process that opened them.

Cost (run): 1.4 us for 4 kB of a local file in the page cache; 2 ms of processor time for a request to S3, 3 ms for one
of 1.3 MB, and 0.3 s to connect first.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

RETRY_SECONDS = (0.5, 2.0, 8.0)
NUM_CONNECTIONS = 32  # requests that a process has under way at once; clients of S3 have a pool of ten if not told
NUM_OPEN_FILES = 64  # file handles that a local folder keeps in one process

# Mistakes of a program, not of a network. Clients of remote storage raise too many kinds of errors to list theirs.
PROGRAM_ERRORS = (AssertionError, AttributeError, ImportError, MemoryError, NameError, TypeError)
WEB_PROTOCOLS = ("http", "https")
HTTP_FORBIDDEN = 403

T = TypeVar("T")


class _UnfitServerError(ValueError):
    """It answers, but cannot do what reading shards needs."""


class Folder:
    """Files of one folder by name. `Folder.open` gives a local or a remote one; `str` of it is its location."""

    is_remote = False

    def __init__(self, location: str) -> None:
        self.location = location

    @staticmethod
    def open(location: str | Path | Folder) -> Folder:
        """Looks at no file yet. ValueError where no installed package reads locations of this kind."""
        if isinstance(location, Folder):
            return location
        if isinstance(location, str) and "://" in location:
            return _RemoteFolder(location.rstrip("/"))
        return _LocalFolder(str(location))

    def __str__(self) -> str:
        return self.location

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.location,)

    def place(self, name: str) -> str:
        """The location of one of the files."""
        return f"{self.location.rstrip('/')}/{name}"

    def sizes(self) -> dict[str, int]:
        """Bytes of every file of the folder, by name: one listing."""
        return self._patiently(self._sizes)

    def size(self, name: str) -> int:
        """Bytes of one file."""
        return self._patiently(lambda: self._size(name), name)

    def read(self, name: str) -> bytes:
        """A whole file."""
        return self._patiently(lambda: self._read(name), name)

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file, all of them: a file that ends before is an I/O error."""
        return self._patiently(lambda: self._read_range(name, start, end), name, start, end)

    def _patiently(self, attempt: Callable[[], T], name: str = "", start: int = 0, end: int | None = None) -> T:
        for pause in (*RETRY_SECONDS, None):
            try:
                return attempt()
            except (*PROGRAM_ERRORS, _UnfitServerError):
                raise
            except Exception as error:
                what = self.place(name) if name else self.location
                if end is not None:
                    what += f", bytes {start} to {end},"
                if isinstance(error, FileNotFoundError):
                    raise FileNotFoundError(f"{what} is missing; copy the folder again or make it again") from None
                if isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError":  # of botocore
                    raise PermissionError(f"{what} may not be read ({error}); check rights and credentials") from error
                if pause is None:
                    tries = len(RETRY_SECONDS) + 1
                    raise OSError(f"{what} cannot be read, tried {tries} times: {_in_words(error)}") from error
                logger.warning("%s cannot be read (%s); trying again in %g s", what, _in_words(error), pause)
            self._forget()
            time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _forget(self) -> None:
        """Drops what may be stale before a second try."""

    def _sizes(self) -> dict[str, int]:
        raise NotImplementedError

    def _size(self, name: str) -> int:
        raise NotImplementedError

    def _read(self, name: str) -> bytes:
        raise NotImplementedError

    def _read_range(self, name: str, start: int, end: int) -> bytes:
        raise NotImplementedError


class _LocalFolder(Folder):
    def __init__(self, location: str) -> None:
        super().__init__(location)
        self._descriptor = functools.lru_cache(maxsize=NUM_OPEN_FILES)(functools.partial(_Descriptor, location))

    def _forget(self) -> None:
        self._descriptor.cache_clear()  # a stale handle of a network file system is opened anew

    def _sizes(self) -> dict[str, int]:
        with os.scandir(self.location) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

    def _size(self, name: str) -> int:
        return Path(self.place(name)).stat().st_size

    def _read(self, name: str) -> bytes:
        return Path(self.place(name)).read_bytes()

    def _read_range(self, name: str, start: int, end: int) -> bytes:
        # pread keeps no position, so that forked processes may share the handle.
        content = os.pread(self._descriptor(name).number, end - start, start)
        if len(content) != end - start:
            raise OSError(f"it ended at byte {start + len(content)}")
        return content


class _Descriptor:
    """An open file, closed when nobody holds it any more."""

    def __init__(self, folder: str, name: str) -> None:
        self.number = -1
        self.number = os.open(f"{folder}/{name}", os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class _RemoteFolder(Folder):
    is_remote = True

    def __init__(self, location: str) -> None:
        import fsspec

        super().__init__(location)
        protocol, _, rest = location.partition("://")
        self._root = f"{protocol}://{rest.partition('/')[0]}"
        self._is_web = protocol in WEB_PROTOCOLS
        try:
            fsspec.get_filesystem_class(protocol)
        except (ImportError, ValueError) as error:
            helps = protocol in ("s3", "s3a", *WEB_PROTOCOLS)  # aiohttp comes with it
            remedy = "`pip install 'uvlm[s3]'` helps" if helps else "or use another location"
            raise ValueError(f"{location} cannot be read here ({error}); {remedy}") from None

    def _call(self, method: str, name: str = "", **options: Any) -> Any:
        """A call of the file system, whose objects must never be those of a parent process."""
        filesystem = _filesystem(self._root, os.getpid())
        return getattr(filesystem, method)(self.place(name) if name else self.location, **options)

    def _sizes(self) -> dict[str, int]:
        self._call("invalidate_cache")
        if self._is_web:
            return self._web_sizes()
        entries = self._call("ls", detail=True)
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries if entry["type"] == "file"}

    def _web_sizes(self) -> dict[str, int]:
        """The listing of a web server is a page of links, without sizes: each file is asked for its own."""
        from concurrent.futures import ThreadPoolExecutor

        try:
            links = self._call("ls", detail=False)
        except Exception as error:
            if not isinstance(error, FileNotFoundError) and getattr(error, "status", None) != HTTP_FORBIDDEN:
                raise
            links = []
        names = [link.rpartition("/")[2] for link in links]
        names = [name for name in names if name and "?" not in name]  # no folders, no links that sort the listing
        if not names:
            raise _UnfitServerError(
                f"{self.location} has no listing of its files, which is needed to check them; let the server list its "
                "folders, or copy the folder to a disk"
            )
        with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
            return dict(zip(names, pool.map(self._size, names), strict=True))

    def _size(self, name: str) -> int:
        self._call("invalidate_cache")
        size: int | None = self._call("info", name)["size"]
        if size is None:
            raise _UnfitServerError(
                f"the server of {self.place(name)} does not tell its size; copy the folder to a disk"
            )
        return size

    def _read(self, name: str) -> bytes:
        return self._call("cat_file", name)

    def _read_range(self, name: str, start: int, end: int) -> bytes:
        content: bytes = self._call("cat_file", name, start=start, end=end)
        if len(content) > end - start:
            raise _UnfitServerError(
                f"the server of {self.place(name)} does not serve byte ranges; copy the folder to a disk, or use a "
                "server that does"
            )
        if len(content) != end - start:
            raise OSError(f"it ended at byte {start + len(content)}")
        return content


@functools.cache
def _filesystem(root: str, process: int) -> Any:
    """The file system of a bucket in this process. Those of a parent stay here untouched and alive: closing one in a
    child would reach for sockets and an event loop that the parent still uses."""
    import fsspec

    options: dict[str, Any] = {}
    protocol = root.partition("://")[0]
    if protocol in ("s3", "s3a"):  # what the user has configured for fsspec stays
        configured = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
        options["config_kwargs"] = {"max_pool_connections": NUM_CONNECTIONS, **configured}
    return fsspec.core.url_to_fs(root, skip_instance_cache=True, **options)[0]


def _in_words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
