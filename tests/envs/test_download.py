"""Downloads from a real server: they resume, they are checked, and archives write only into their folder."""

import http.server
import io
import re
import socket
import threading
import zipfile
from pathlib import Path

import pytest
from support.alfworld_files import GAMES, write_official_files
from support.runs import skip_or_fail

from aem_exp import prepare
from aem_exp.core.errors import ConfigError
from aem_exp.core.extras import install_command
from aem_exp.envs import download
from aem_exp.envs.alfworld import library, official_games
from aem_exp.envs.alfworld import world as alfworld


class FileHandler(http.server.BaseHTTPRequestHandler):
    """Serves `files`. Closes the connection after `most` bytes of an answer."""

    files: dict[str, bytes]
    most: int | None
    ranges: bool
    requested_ranges: list[str | None]

    def do_GET(self):
        data = self.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        wanted = self.headers["Range"]
        self.requested_ranges.append(wanted)
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and self.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:][: self.most])

    def log_message(self, *_):
        pass


@pytest.fixture
def file_server():
    handler = type("Handler", (FileHandler,), {"files": {}, "most": None, "ranges": True, "requested_ranges": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.address = f"http://127.0.0.1:{server.server_address[1]}"
    yield handler
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"220 mail ready\r\n", "BadStatusLine"),  # not a web server
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nff\r\n", "IncompleteRead"),  # breaks off
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 30, "20 bytes"),  # no length
    ],
)
def test_an_invalid_answer_is_an_error_in_one_line(answer, message, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            connection.recv(1 << 16)
            connection.sendall(answer)
            connection.close()

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(ConfigError, match=message) as caught:
            download.fetch(f"http://127.0.0.1:{server.getsockname()[1]}/x", tmp_path / "x", 20, print)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def zip_files(files: dict[str, bytes | str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.slow
def test_an_interrupted_download_resumes(file_server, tmp_path):
    file_server.files["/big"], file = bytes(range(256)) * 20_000, tmp_path / "big"
    url, size, lines = f"{file_server.address}/big", len(file_server.files["/big"]), []
    file_server.most = size // 3
    with pytest.raises(ConfigError, match=rf" {size // 3:,} of {size:,} bytes.* {file}$") as caught:
        download.fetch(url, file, size, lines.append)
    assert caught.value.value == url
    file_server.most = None
    assert download.fetch(url, file, size, lines.append).read_bytes() == file_server.files["/big"]
    assert file_server.requested_ranges == [None, f"bytes={size // 3}-"]
    download.fetch(url, file, size, lines.append)
    assert len(file_server.requested_ranges) == len(lines) == 2  # a complete file is not downloaded again


@pytest.mark.slow
def test_a_server_may_ignore_the_requested_range(file_server, tmp_path):
    file_server.files["/big"], file_server.ranges = b"0123456789" * 1000, False
    (tmp_path / "big.part").write_bytes(b"0123")
    file = download.fetch(f"{file_server.address}/big", tmp_path / "big", 10_000, print)
    assert file.read_bytes() == file_server.files["/big"]


@pytest.mark.slow
def test_a_file_of_another_size_is_refused(file_server, tmp_path):
    file_server.files["/big"] = b"a page that says please log in"
    with pytest.raises(ConfigError, match=r"30 bytes .*20"):
        download.fetch(f"{file_server.address}/big", tmp_path / "big", 20, print)
    with pytest.raises(ConfigError, match="Not Found"):
        download.fetch(f"{file_server.address}/nothing", tmp_path / "nothing", 20, print)
    assert not (tmp_path / "big").exists()


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/../../out"])
def test_an_archive_writes_only_into_its_folder(name, tmp_path):
    archive = tmp_path / "evil.zip"
    archive.write_bytes(zip_files({"fine": "x", name: "y"}))
    (tmp_path / "in").mkdir()
    with pytest.raises(ConfigError) as caught:
        download.unzip(archive, tmp_path / "in", print)
    assert caught.value.value == str(archive) and repr(name) in caught.value.remedy
    assert not (tmp_path / "out").exists() and not Path("/tmp/out").exists()


def test_a_damaged_archive_is_refused(tmp_path):
    archive = tmp_path / "half.zip"
    archive.write_bytes(zip_files({"a": "x" * 10_000})[:-40])
    with pytest.raises(ConfigError, match="not a zip file") as caught:
        download.unzip(archive, tmp_path, print)
    assert caught.value.value == str(archive)
    data = bytearray(zip_files({"a": bytes(range(256)) * 40}))
    data[60:90] = bytes(30)  # the right size, but wrong content
    archive.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        download.unzip(archive, tmp_path, print)
    assert caught.value.value == str(archive)


@pytest.mark.slow
def test_prepare_downloads_and_indexes_alfworld_and_repairs_it_when_called_again(
    file_server, tmp_path, monkeypatch, capsys
):
    """One command downloads two archives and builds an index; then only the weights are missing."""
    if not all(map(library.importlib.util.find_spec, library.PACKAGES)):
        skip_or_fail(install_command("alfworld"))
    made = write_official_files(tmp_path / "made")
    files = {str(file.relative_to(made)): file.read_bytes() for file in made.rglob("*.*") if file.is_file()}
    parts = []
    for name in ("traj_data.json", "game.tw-pddl"):
        content = zip_files({path: data for path, data in files.items() if path.endswith(name)})
        file_server.files[f"/{name}.zip"] = content
        parts.append((f"{file_server.address}/{name}.zip", len(content)))
    monkeypatch.setattr(official_games, "ARCHIVES", parts)
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("AEM_CACHE", str(tmp_path / "cache"))
    games = str(GAMES).replace("'", "")
    arguments = ["+experiment=alfworld_1_5b", f"+env.make.games={games}", f"model.path={tmp_path}/weights"]

    def prepare_alfworld():
        assert prepare.main(arguments) == 2  # the weights do not exist
        out, err = capsys.readouterr()
        assert "world   alfworld: 12 train, 12 dev, 6 test_seen tasks" in out and "model.path" in err
        return out

    for unpacked in (2, 0, 2):
        if unpacked and file_server.requested_ranges:  # as after interrupted unpacking: some games are missing
            for file in sorted((tmp_path / "data").rglob("game.tw-pddl"))[::2]:
                file.unlink()
        assert prepare_alfworld().count("unpack") == unpacked
    assert len(file_server.requested_ranges) == 2  # each archive was downloaded once
    (changed,) = list((tmp_path / "data").rglob("game.tw-pddl"))[:1]
    changed.write_text(changed.read_text().replace("You arrive at", "You are at"))
    assert prepare_alfworld().count("unpack") == 0  # a changed game is only indexed again
    task = next(t for split in alfworld.AlfWorld.splits for t in full_world().tasks(split) if t.id in str(changed))
    assert full_world().env().reset(task).observation


def full_world():
    return alfworld.AlfWorld(games=GAMES)
