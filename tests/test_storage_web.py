"""Shards on a web server are read like those on a disk; one that cannot do what that needs is told in a sentence."""

import contextlib
import functools
import http.server
import io
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from data_pipeline import storage
from data_pipeline.schema import Document
from data_pipeline.shards import ShardWriter
from data_pipeline.split import Split
from data_pipeline.storage import Folder
from tests.test_schema import make_document


class Plain(http.server.SimpleHTTPRequestHandler):
    """Lists folders, and gives whole files whatever range is asked for."""

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class Ranged(Plain):
    def send_head(self) -> io.BytesIO | BinaryIO | None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if wanted is None or not path.is_file():
            return super().send_head()
        part = path.read_bytes()[int(wanted[1]) : int(wanted[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        return io.BytesIO(part)


class WithoutListing(Ranged):
    def list_directory(self, path: object) -> None:
        self.send_error(403)


class WithIndexPage(Ranged):
    def list_directory(self, path: object) -> io.BytesIO:
        page = b"<html>welcome</html>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        return io.BytesIO(page)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(storage, "RETRY_SECONDS", ())
    with ShardWriter(tmp_path / "shards", 4) as writer:
        for i in range(10):
            writer.write(make_document(f"{i}", image_bytes={"0.png": bytes([i]) * 5000}))
    (tmp_path / "shards" / "folder").mkdir()
    return tmp_path / "shards"


@contextlib.contextmanager
def served(folder: Path, handler: type[Plain]) -> Iterator[str]:
    """The URL of the folder."""
    bound = functools.partial(handler, directory=str(folder.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), bound) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/{folder.name}"
        finally:
            server.shutdown()
            thread.join()


def test_documents_on_a_web_server_are_those_of_the_folder(folder: Path) -> None:
    with served(folder, Ranged) as url:
        assert Folder.open(url).sizes() == Folder.open(folder).sizes()
        remote, local = Split.open(url), Split.open(folder)
        remote.prefetch(range(3, 9))
        for sample in range(10):
            there, here = remote.read(sample), local.read(sample)
            assert isinstance(there, Document)
            assert isinstance(here, Document)
            assert there.to_members() == here.to_members()
        with pytest.raises(FileNotFoundError, match=rf"{url}/no.tar, bytes 0 to 5, is missing"):
            remote.folder.read_range("no.tar", 0, 5)
        with pytest.raises(FileNotFoundError, match=rf"{url}s has no manifest"):
            Split.open(url + "s")


def test_a_web_server_without_byte_ranges_is_refused(folder: Path) -> None:
    with served(folder, Plain) as url:
        split = Split.open(url)
        with pytest.raises(ValueError, match=rf"{url}/shard-000000.tar does not serve byte ranges; copy the folder"):
            split.read(1)


@pytest.mark.parametrize("handler", [WithoutListing, WithIndexPage])
def test_a_web_server_without_listing_is_refused(folder: Path, handler: type[Plain]) -> None:
    with served(folder, handler) as url, pytest.raises(ValueError, match=rf"{url} has no listing of its files"):
        Split.open(url)
