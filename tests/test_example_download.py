"""The download of the example, against a real HTTP server on this machine."""

import contextlib
import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from resnet20.download import CIFAR10, Archive, fetch
from resnet20.errors import UserError

FILES = {"a.bin": b"a" * 70_000, "b.bin": bytes(range(256)) * 4_000}


@dataclass
class Site:
    """What the server holds, how it behaves, and what it was asked for."""

    content: bytes
    ranges: bool = True
    break_after: list[int] = field(default_factory=list)  # bytes, one entry per broken answer
    status: int | None = None
    asked: list[str | None] = field(default_factory=list)
    url: str = ""

    def archive(self, content: bytes | None = None) -> Archive:
        """The archive as the user expects it: as it is served, or as ``content``."""
        wanted = self.content if content is None else content
        return Archive(
            url=self.url,
            size=len(wanted),
            sha256=hashlib.sha256(wanted).hexdigest(),
            folder="images",
            files={name: len(data) for name, data in FILES.items()},
        )


@contextlib.contextmanager
def serve(site: Site) -> Iterator[Site]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            site.asked.append(wanted)
            if site.status is not None:
                self.send_error(site.status)
                return
            start = 0
            if wanted is not None and site.ranges:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                if start >= len(site.content):
                    self.send_error(416)
                    return
                self.send_response(206)
                size = len(site.content)
                self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
            else:
                self.send_response(200)
            body = site.content[start:]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if site.break_after:
                body = body[: site.break_after.pop(0)]
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.url = f"http://127.0.0.1:{server.server_port}/archive.tar.gz"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def pack(
    members: dict[str, bytes] | None = None, extra: list[tarfile.TarInfo] | None = None
) -> bytes:
    buffer = io.BytesIO()
    if members is None:
        members = {f"images/{name}": data for name, data in FILES.items()}
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in extra or []:
            tar.addfile(info)
    return buffer.getvalue()


def everything_below(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def assert_complete(directory: Path) -> None:
    for name, data in FILES.items():
        assert (directory / "images" / name).read_bytes() == data
    # Neither the archive nor anything half done is left.
    assert everything_below(directory) == {"images", *(f"images/{name}" for name in FILES)}


@pytest.fixture
def site() -> Iterator[Site]:
    with serve(Site(pack())) as served:
        yield served


def test_official_archive() -> None:
    assert CIFAR10.url == "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    assert CIFAR10.size == 170_052_171
    assert CIFAR10.sha256 == "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    assert len(CIFAR10.files) == 6
    assert set(CIFAR10.files.values()) == {30_730_000}


def test_downloads_unpacks_and_reports_progress(site: Site, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = fetch(site.archive(), tmp_path / "new", lambda done, total: seen.append((done, total)))
    assert folder == tmp_path / "new" / "images"
    assert_complete(tmp_path / "new")
    assert seen[-1] == (len(site.content), len(site.content))
    assert site.asked == [None]


def test_leaves_complete_files_alone(site: Site, tmp_path: Path) -> None:
    fetch(site.archive(), tmp_path)
    fetch(site.archive(), tmp_path)
    assert len(site.asked) == 1


def test_goes_on_after_dropped_connections(site: Site, tmp_path: Path) -> None:
    site.break_after = [300, 200]
    fetch(site.archive(), tmp_path, pause=0)
    assert_complete(tmp_path)
    assert site.asked == [None, "bytes=300-", "bytes=500-"]


def test_second_call_goes_on_where_the_first_gave_up(site: Site, tmp_path: Path) -> None:
    site.break_after = [400]
    with pytest.raises(UserError, match=r"have 400 of [\d,]+ bytes\); run the same command again"):
        fetch(site.archive(), tmp_path, attempts=1)
    assert everything_below(tmp_path) == {"archive.tar.gz.part"}
    fetch(site.archive(), tmp_path, attempts=1)
    assert_complete(tmp_path)
    assert site.asked == [None, "bytes=400-"]


def test_restarts_when_the_server_ignores_range(site: Site, tmp_path: Path) -> None:
    site.ranges = False
    site.break_after = [400]
    fetch(site.archive(), tmp_path, pause=0)
    assert_complete(tmp_path)
    assert site.asked == [None, "bytes=400-"]


@pytest.mark.parametrize("rest", [b"x" * 100, b"x" * 10_000_000], ids=["short", "too long"])
def test_restarts_when_the_part_is_bad(site: Site, tmp_path: Path, rest: bytes) -> None:
    (tmp_path / "archive.tar.gz.part").write_bytes(rest)
    fetch(site.archive(), tmp_path, pause=0)
    assert_complete(tmp_path)
    assert site.asked[-1] is None


def test_bad_part_of_full_size(site: Site, tmp_path: Path) -> None:
    (tmp_path / "archive.tar.gz.part").write_bytes(b"x" * len(site.content))
    fetch(site.archive(), tmp_path, pause=0)
    assert_complete(tmp_path)


def test_wrong_digest_leaves_nothing(site: Site, tmp_path: Path) -> None:
    wanted = site.archive(site.content[:-1] + b"!")
    with pytest.raises(UserError, match="wrong SHA-256"):
        fetch(wanted, tmp_path, pause=0)
    assert everything_below(tmp_path) == set()
    assert len(site.asked) == 1  # the whole archive is not fetched again and again


def test_more_bytes_than_promised(site: Site, tmp_path: Path) -> None:
    wanted = site.archive(site.content[:-10])
    with pytest.raises(UserError, match="more than it should"):
        fetch(wanted, tmp_path, attempts=2, pause=0)
    assert not (tmp_path / "images").exists()


def test_server_error_and_no_server(site: Site, tmp_path: Path) -> None:
    site.status = 404
    with pytest.raises(UserError, match="answered 404"):
        fetch(site.archive(), tmp_path, attempts=1)
    with serve(Site(b"")) as gone:
        archive = gone.archive(site.content)
    with pytest.raises(UserError, match="could not download"):
        fetch(archive, tmp_path, attempts=1)


def test_directory_that_cannot_be_made(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match="choose another --data"):
        fetch(site.archive(), tmp_path / "file" / "data")
    assert (tmp_path / "file").read_text() == "kept"
    assert site.asked == []


def _link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_link_in_place_of_a_file(tmp_path: Path, kind: bytes) -> None:
    secret = tmp_path / "secret"
    secret.write_text("kept")
    content = pack({"images/b.bin": FILES["b.bin"]}, [_link("images/a.bin", str(secret), kind)])
    with serve(Site(content)) as site, pytest.raises(UserError, match="unexpected"):
        fetch(site.archive(), tmp_path / "data")
    assert secret.read_text() == "kept"
    assert not (tmp_path / "data" / "images").exists()


def test_members_outside_the_folder_are_not_written(tmp_path: Path) -> None:
    members = {f"images/{name}": data for name, data in FILES.items()}
    members |= {"../evil": b"1", "/tmp/dfw-evil": b"2", "images/../../evil": b"3", "images/x": b"4"}
    with serve(Site(pack(members))) as site:
        fetch(site.archive(), tmp_path / "data")
    assert_complete(tmp_path / "data")
    assert everything_below(tmp_path) == {"data"} | {
        f"data/{name}" for name in everything_below(tmp_path / "data")
    }
    assert not Path("/tmp/dfw-evil").exists()


def test_archive_that_lacks_a_file_or_has_another_size(tmp_path: Path) -> None:
    with (
        serve(Site(pack({"images/a.bin": FILES["a.bin"]}))) as site,
        pytest.raises(UserError, match=r"lacks b\.bin"),
    ):
        fetch(site.archive(), tmp_path)
    with (
        serve(Site(pack({"images/a.bin": b"short", "images/b.bin": FILES["b.bin"]}))) as site,
        pytest.raises(UserError, match="unexpected"),
    ):
        fetch(site.archive(), tmp_path / "other")
    assert not (tmp_path / "images").exists()
    assert not (tmp_path / "other" / "images").exists()


@pytest.mark.parametrize("content", [b"no archive at all", pack()[:-2000]], ids=["text", "cut"])
def test_archive_that_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    with serve(Site(content)) as site, pytest.raises(UserError, match="cannot be unpacked"):
        fetch(site.archive(), tmp_path)
    assert not (tmp_path / "images").exists()
