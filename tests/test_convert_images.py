"""Images come in as the bytes they are, from wherever a record says; what cannot be had has a reason."""

import base64
import dataclasses
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import ClassVar

import pytest
from PIL import Image

from data_pipeline.convert import fetch
from data_pipeline.convert.draft import Draft, ImageReference
from data_pipeline.convert.images import DOCUMENTS_AHEAD, image_type, resolve
from data_pipeline.convert.options import Options
from data_pipeline.schema import Document, Rejected


def picture(kind: str = "PNG", color: str = "red") -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, kind)
    return buffer.getvalue()


def resolved(folder: Path, *images: ImageReference, **options: object) -> list[Document | Rejected]:
    """A document with one image each."""
    drafts = ((str(i), Draft(["x", None], [None, image], "generate")) for i, image in enumerate(images))
    found = list(resolve(iter(drafts), folder, "source", Options(**options)))  # type: ignore[arg-type]
    assert all(not left_out for _, left_out in found)
    return [result for result, _ in found]


def reasons(folder: Path, *images: ImageReference, **options: object) -> list[str]:
    """The category of what was rejected, "" for a document."""
    found = resolved(folder, *images, **options)
    return [result.category if isinstance(result, Rejected) else "" for result in found]


class Host(BaseHTTPRequestHandler):
    """Answers by path; counts the requests of each."""

    requests: dict[str, int]
    released: threading.Event
    hung_up = threading.Event()
    is_too_far = threading.Event()
    ahead: ClassVar[list[int]] = []  # requests that the documents written so far did not need, at each request
    num_written = 0
    together: threading.Barrier

    def do_GET(self) -> None:
        self.requests[self.path] = count = self.requests.get(self.path, 0) + 1
        body, status, announced = picture(), 200, 0
        if self.path.startswith("/status"):
            status, body = int(self.path[-3:]), b"no"
        elif self.path == "/second-try" and count == 1:
            status, body = 500, b"no"
        elif self.path == "/short":
            announced = len(body) + 9
        elif self.path == "/large":
            body = body + bytes(5000)
        elif self.path == "/page":
            body = b"<html></html>"
        if self.path.startswith("/at-once"):
            self.together.wait(20)
        if self.path == "/headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            try:
                while not self.released.wait(0.02):
                    self.wfile.write(b"x")
            except OSError:
                self.hung_up.set()
            return
        if self.path.startswith("/ahead"):
            self.ahead.append(len(self.requests) - self.num_written)
            if self.ahead[-1] > 6:
                self.is_too_far.set()
            if self.path == "/ahead0":
                self.is_too_far.wait(0.5)
        self.send_response(302 if self.path.startswith("/to") else status)
        location = {"/to": "/fine", "/to-file": "file:///etc/passwd", "/to-itself": "/to-itself"}.get(self.path)
        if location is not None:
            self.send_header("Location", location)
        if self.path not in ("/endless", "/slow"):
            self.send_header("Content-Length", str(announced or len(body)))
        self.end_headers()
        if self.path == "/slow":
            self.released.wait(20)
        while self.path == "/endless" and not self.released.is_set():
            try:
                self.wfile.write(bytes(1000))
            except OSError:
                return
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, int]]]:
    """(its address, requests by path); a fetch from it waits and retries for a moment only."""
    monkeypatch.setattr(fetch, "BACK_OFF_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(fetch, "TIMEOUT_SECONDS", 5.0)
    handler = type(
        "Handler", (Host,), {"requests": {}, "released": threading.Event(), "together": threading.Barrier(8)}
    )
    monkeypatch.setattr(ThreadingHTTPServer, "request_queue_size", 128)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", handler.requests  # type: ignore[attr-defined]
        handler.released.set()  # type: ignore[attr-defined]
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif"), ("BMP", "bmp")]
)
def test_the_type_is_read_from_the_bytes_and_the_bytes_are_kept(tmp_path: Path, kind: str, extension: str) -> None:
    content = picture(kind)
    (tmp_path / "a.txt").write_bytes(content)
    url = "data:image/x;base64," + base64.b64encode(content).decode()
    for document in resolved(tmp_path, content, "a.txt", str(tmp_path / "a.txt"), url):
        assert isinstance(document, Document)
        assert document.images == (None, f"0.{extension}")
        assert document.image_bytes == {f"0.{extension}": content}


def test_bytes_that_are_no_known_image_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    unknown: list[ImageReference] = [b"GIF", b"BM and more text than a header", picture("TIFF"), "."]
    assert reasons(tmp_path, *unknown, "data:image/png;base64,!") == ["image is of an unknown type"] * 5
    assert reasons(tmp_path, b"", "empty.png", "data:,x") == ["image is empty"] * 3
    assert image_type(b"RIFF1234WAVE") is None


def test_a_path_never_leaves_the_image_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    for path in (root / "sub/a.png", tmp_path / "out.png"):
        path.write_bytes(picture())
    (root / "link.png").symlink_to(tmp_path / "out.png")
    (root / "inner.png").symlink_to(root / "sub/a.png")
    leaves, absolute = "image path leaves the image root", str(tmp_path / "out.png")
    inside = ["sub/a.png", "./sub/../sub/a.png", "inner.png"]
    inside.append(str(root / "sub/a.png"))
    assert reasons(root, *inside, "../out.png", "link.png", absolute) == [""] * 4 + [leaves] * 3
    (result,) = resolved(root, absolute)
    assert isinstance(result, Rejected)
    assert "--image-root" in result.reason
    elsewhere = tmp_path / "elsewhere"
    assert reasons(elsewhere, *inside, "../out.png", absolute, image_root=root) == [""] * 4 + [leaves] * 2
    assert reasons(elsewhere, absolute, image_root=Path("/")) == [""]


def test_paths_that_cannot_be_are_missing_and_no_crash(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "loop").symlink_to("loop")
    images = ["b.png", "a.png/b.png", "x" * 5000, "loop"]
    assert reasons(tmp_path, *images) == ["image is missing"] * 4
    assert reasons(tmp_path, "", "a\0.png", "\ud800.png") == ["image path is missing"] * 3


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "a.png")
    assert reasons(tmp_path, "a.png") == ["image is of an unknown type"]


def test_an_image_over_the_cap_is_rejected_from_anywhere(
    tmp_path: Path, host: tuple[str, dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "MAX_IMAGE_BYTES", 4000)
    (tmp_path / "a.png").write_bytes(picture() + bytes(5000))
    urls = [f"{host[0]}/large", f"{host[0]}/endless"]
    large: list[ImageReference] = ["a.png", picture() + bytes(5000), *urls]
    large += ["data:image/png;base64," + base64.b64encode(picture() + bytes(5000)).decode()]
    assert reasons(tmp_path, *large, picture()) == ["image is too large"] * 5 + [""]
    assert host[1] == {"/large": 1, "/endless": 1}, "a second try would change nothing"


def test_urls_are_fetched_and_failures_told(tmp_path: Path, host: tuple[str, dict[str, int]]) -> None:
    address, requests = host
    paths = ["/fine", "/to", "/second-try", "/page", "/status404", "/status503", "/short", "/to-file", "/to-itself"]
    found = resolved(tmp_path, *(address + path for path in paths))
    for document in found[:3]:
        assert isinstance(document, Document)
        assert document.image_bytes == {"0.png": picture()}
    failed = [result.reason.replace(address, "") for result in found[3:] if isinstance(result, Rejected)]
    assert failed == [
        "image is of an unknown type: /page",
        "image URL failed: status 404: /status404",
        "image URL failed: status 503: /status503",
        "image URL failed: ProtocolError: /short",
        "image URL failed: redirected to something else than http: /to-file",
        "image URL failed: too many redirects: /to-itself",
    ]
    counts = {path: requests[path] for path in ("/status404", "/status503", "/short", "/second-try", "/to-itself")}
    assert counts == {"/status404": 1, "/status503": 3, "/short": 3, "/second-try": 2, "/to-itself": 6}


def test_a_host_that_never_answers_or_is_gone_or_is_no_host_ends_in_a_reason(
    tmp_path: Path, host: tuple[str, dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "TIMEOUT_SECONDS", 0.2)
    bad = [f"{host[0]}/slow", "http://127.0.0.1:1/a.png", "http://[/a.png", "http://", "https://\ud800/a.png"]
    assert reasons(tmp_path, *bad) == ["image URL failed"] * 5


def test_a_body_that_comes_in_drips_ends_at_the_deadline(
    tmp_path: Path, host: tuple[str, dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "DEADLINE_SECONDS", 0.2)
    monkeypatch.setattr(fetch, "MAX_IMAGE_BYTES", 1 << 40)
    (result,) = resolved(tmp_path, f"{host[0]}/endless")
    assert isinstance(result, Rejected)
    assert result.reason.startswith("image URL failed: too slow")


def test_a_header_that_comes_in_drips_ends_at_the_deadline_and_its_connection_with_it(
    tmp_path: Path, host: tuple[str, dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "DEADLINE_SECONDS", 0.2)
    monkeypatch.setattr(fetch, "NUM_THREADS", 1)  # so that the second needs the thread that takes the first one's place
    Host.hung_up.clear()
    drips, fine = resolved(tmp_path, f"{host[0]}/headers", f"{host[0]}/fine")
    assert isinstance(drips, Rejected)
    assert drips.reason.startswith("image URL failed: too slow")
    assert isinstance(fine, Document)
    assert Host.hung_up.wait(20)


def test_images_are_fetched_ahead_only_while_there_is_memory_for_them(
    tmp_path: Path, host: tuple[str, dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "ROOM_BYTES", len(picture()))
    monkeypatch.setattr(fetch, "MAX_BYTES_AHEAD", 4 * len(picture()))
    Host.is_too_far.clear()
    Host.ahead.clear()
    drafts = ((str(i), Draft([None], [f"{host[0]}/ahead{i}"], "generate")) for i in range(40))
    for Host.num_written, (document, _) in enumerate(resolve(drafts, tmp_path, "s", Options()), 1):
        assert isinstance(document, Document)
    assert len(Host.ahead) == 40
    assert max(Host.ahead) <= 6, "four that wait, one that is needed now and one that is handed out"


def test_drafts_that_hold_their_images_do_not_pile_up_behind_a_url(
    tmp_path: Path, host: tuple[str, dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "MAX_BYTES_AHEAD", 4 * len(picture()))
    num_drafted = 0

    def drafts() -> Iterator[tuple[str, Draft]]:
        nonlocal num_drafted
        for num_drafted in range(1, 21):
            image = picture() if num_drafted > 1 else f"{host[0]}/fine"
            yield str(num_drafted), Draft([None], [image], "generate")

    next(resolve(drafts(), tmp_path, "s", Options()))
    assert num_drafted <= 6


def test_urls_are_fetched_at_once_and_come_in_order(tmp_path: Path, host: tuple[str, dict[str, int]]) -> None:
    images: list[ImageReference] = []
    for i in range(DOCUMENTS_AHEAD + 50):
        images += [f"{host[0]}/{i}"] if i % 3 else [picture()]
    images += [f"{host[0]}/at-once{i}" for i in range(8)]  # none is answered before all are asked
    found = resolved(tmp_path, *images)
    assert [result.key for result in found] == [str(i) for i in range(len(images))]
    assert [result for result in found if isinstance(result, Rejected)] == []


def test_images_are_numbered_and_the_loss_follows_the_slots(tmp_path: Path) -> None:
    draft = Draft(["a", None, "b", None], [None, picture(), None, picture("GIF")], "interleave")
    ((document, _),) = resolve(iter([("0", draft)]), tmp_path, "s", Options())
    assert isinstance(document, Document)
    assert document.images == (None, "0.png", None, "1.gif")
    assert (document.texts, document.loss) == (("a", None, "b", None), (False, True, True, True))


def test_a_missing_image_may_cost_its_slot_only_in_interleaved_documents(tmp_path: Path) -> None:
    draft = Draft(["a", None, "b", None], [None, "gone.png", None, picture()], "interleave", [False, True, True, False])
    options = Options(drop_missing_images=True)
    ((rejected, _),) = resolve(iter([("0", draft)]), tmp_path, "s", Options())
    assert isinstance(rejected, Rejected)
    ((document, left_out),) = resolve(iter([("0", draft)]), tmp_path, "s", options)
    assert isinstance(document, Document)
    assert (document.texts, document.images) == (("a", "b", None), (None, None, "0.png"))
    assert document.loss == (False, True, False)
    assert left_out == [f"image is missing: {tmp_path / 'gone.png'}"]
    for changed in (
        dataclasses.replace(draft, task="generate"),
        dataclasses.replace(draft, loss=[False, True, False, False]),
    ):
        ((rejected, _),) = resolve(iter([("0", changed)]), tmp_path, "s", options)
        assert isinstance(rejected, Rejected), "a caption without its image, or nothing left to learn"


def test_half_a_surrogate_pair_in_a_text_is_rejected(tmp_path: Path) -> None:
    ((result, _),) = resolve(iter([("0", Draft(["\ud800"], [None], "text"))]), tmp_path, "s", Options())
    assert result == Rejected("0", "text is not valid UTF-8")
