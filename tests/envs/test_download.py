"""Files from a real server: resumed, checked, unpacked nowhere but where they belong."""

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


class Shelf(http.server.BaseHTTPRequestHandler):
    """Serves `files`; hangs up after `most` bytes of an answer."""

    files: dict[str, bytes]
    most: int | None
    ranges: bool
    asked: list[str | None]

    def do_GET(self):
        data = self.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        wanted = self.headers["Range"]
        self.asked.append(wanted)
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and self.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:][: self.most])

    def log_message(self, *_):
        pass


@pytest.fixture
def shelf():
    handler = type("Mine", (Shelf,), {"files": {}, "most": None, "ranges": True, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.address = f"http://127.0.0.1:{server.server_address[1]}"
    yield handler
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"220 mail ready\r\n", "download failed"),  # no web server at all
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nff\r\n", "download failed"),  # breaks off
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 30, "more than the 20 bytes"),  # tells no length
    ],
)
def test_a_strange_answer_is_one_sentence(answer, said, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            connection.recv(1 << 16)
            connection.sendall(answer)
            connection.close()

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(ConfigError, match=said) as error:
            download.fetch(f"http://127.0.0.1:{server.getsockname()[1]}/x", tmp_path / "x", 20, print)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x").exists()


def packed(files: dict[str, bytes | str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def test_what_broke_off_is_gone_on_with(shelf, tmp_path):
    shelf.files["/big"], file = bytes(range(256)) * 20_000, tmp_path / "big"
    size, said = len(shelf.files["/big"]), []
    shelf.most = size // 3
    with pytest.raises(ConfigError, match=rf"{shelf.address}/big: download failed .*broke off.* save it as {file}"):
        download.fetch(f"{shelf.address}/big", file, size, said.append)
    shelf.most = None
    assert download.fetch(f"{shelf.address}/big", file, size, said.append).read_bytes() == shelf.files["/big"]
    assert shelf.asked == [None, f"bytes={size // 3}-"]
    download.fetch(f"{shelf.address}/big", file, size, said.append)
    assert len(shelf.asked) == len(said) == 2  # it is there


def test_a_server_that_begins_anew_is_no_trouble(shelf, tmp_path):
    shelf.files["/big"], shelf.ranges = b"0123456789" * 1000, False
    (tmp_path / "big.part").write_bytes(b"0123")
    assert download.fetch(f"{shelf.address}/big", tmp_path / "big", 10_000, print).read_bytes() == shelf.files["/big"]


def test_another_file_is_refused(shelf, tmp_path):
    shelf.files["/big"] = b"a page that says please log in"
    with pytest.raises(ConfigError, match=r"it has 30 bytes, and should have 20: another file"):
        download.fetch(f"{shelf.address}/big", tmp_path / "big", 20, print)
    with pytest.raises(ConfigError, match="Not Found"):
        download.fetch(f"{shelf.address}/nothing", tmp_path / "nothing", 20, print)
    assert not (tmp_path / "big").exists()


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/../../out"])
def test_an_archive_writes_nowhere_else(name, tmp_path):
    archive = tmp_path / "evil.zip"
    archive.write_bytes(packed({"fine": "x", name: "y"}))
    (tmp_path / "in").mkdir()
    with pytest.raises(ConfigError, match="which lies elsewhere"):
        download.unzip(archive, tmp_path / "in", print)
    assert not (tmp_path / "out").exists() and not Path("/tmp/out").exists()


def test_a_broken_archive_is_one_sentence(tmp_path):
    archive = tmp_path / "half.zip"
    archive.write_bytes(packed({"a": "x" * 10_000})[:-40])
    with pytest.raises(ConfigError, match="cannot be unpacked"):
        download.unzip(archive, tmp_path, print)
    data = bytearray(packed({"a": bytes(range(256)) * 40}))
    data[60:90] = bytes(30)  # as long as it should be, and something else inside
    archive.write_bytes(data)
    with pytest.raises(ConfigError, match="cannot be unpacked"):
        download.unzip(archive, tmp_path, print)


def test_prepare_brings_alfworld_and_asked_again_checks(shelf, tmp_path, monkeypatch, capsys):
    """One command, two archives, an index; what is then missing are the weights."""
    if not all(map(library.importlib.util.find_spec, library.PACKAGES)):
        skip_or_fail(install_command("alfworld"))
    made = write_official_files(tmp_path / "made")
    files = {str(file.relative_to(made)): file.read_bytes() for file in made.rglob("*.*") if file.is_file()}
    parts = []
    for name in ("traj_data.json", "game.tw-pddl"):
        shelf.files[f"/{name}.zip"] = packed({path: data for path, data in files.items() if path.endswith(name)})
        parts.append((f"{shelf.address}/{name}.zip", len(shelf.files[f"/{name}.zip"])))
    monkeypatch.setattr(official_games, "ARCHIVES", parts)
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("AEM_CACHE", str(tmp_path / "cache"))
    games = str(GAMES).replace("'", "")
    asked = ["+experiment=alfworld_1_5b", f"+env.make.games={games}", f"model.path={tmp_path}/weights"]

    def ask():
        assert prepare.main(asked) == 2  # weights that nobody can fetch
        out, err = capsys.readouterr()
        assert "world   alfworld: 12 train, 12 dev, 6 test_seen tasks" in out and "model.path" in err
        return out

    for unpacked in (2, 0, 2):
        if unpacked and shelf.asked:  # unpacking was interrupted: some games are there, some are not
            for file in sorted((tmp_path / "data").rglob("game.tw-pddl"))[::2]:
                file.unlink()
        assert ask().count("unpack") == unpacked
    assert len(shelf.asked) == 2  # the archives were fetched once
    (changed,) = list((tmp_path / "data").rglob("game.tw-pddl"))[:1]
    changed.write_text(changed.read_text().replace("You arrive at", "You are at"))
    assert ask().count("unpack") == 0  # it is a game like others: indexed anew
    task = next(t for split in alfworld.AlfWorld.splits for t in whole().tasks(split) if t.id in str(changed))
    assert whole().env().reset(task).observation


def whole():
    return alfworld.AlfWorld(games=GAMES)
