"""Published weights from stand-ins of the hub and of torchvision's server: verified, or refused in one line."""

import hashlib
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

import pytest
from helpers import ROOT, message

from mdlib.models.fetch import PUBLISHED, fetch_weights
from mdlib.models.pretrained import INCEPTION, LPIPS_BACKBONES

CONTENT = b"weights" * 1000
SUM = hashlib.sha256(CONTENT).hexdigest()
VAVAE = PUBLISHED["vavae"]


class Server(ThreadingHTTPServer):
    """Answers with `pages`: path → bytes; `stated` is the size that HEAD gives where it is another one."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.pages, self.stated = {}, None
        self.address = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.head(self.server.stated)

    def do_GET(self):
        self.head(None)
        self.wfile.write(self.server.pages.get(self.path.partition("?")[0], b""))

    def head(self, stated):
        path, server = self.path.partition("?")[0], self.server
        body = server.pages.get(path)
        self.send_response(200 if body is not None else 404)
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{SUM}"')
        self.send_header("Content-Length", str(stated or len(body or b"")))
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(server):
    """A hub that holds the VA-VAE and a DINOv2."""
    for name in ("vavae", "dinov2-small"):
        known = PUBLISHED[name]
        facts = dict(size=len(CONTENT), blobId="b", lfs=dict(size=len(CONTENT), sha256=SUM, pointerSize=1))
        siblings = [{"rfilename": file, **facts} for file in (*known.files, "README.md")]
        about = dict(id=known.source, sha="a" * 40, siblings=siblings, cardData={"license": "mit"})
        server.pages[f"/api/models/{known.source}"] = json.dumps(about).encode()
        server.pages |= {f"/{known.source}/resolve/main/{file}": CONTENT for file in known.files}
    return server


def fetched(name, address, folder, code=0):
    """What `mdlib fetch NAME` prints with the hub at an address, without warnings and progress."""
    own = {"HF_ENDPOINT": address, "HF_HOME": str(folder), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    own |= dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")
    words = [sys.executable, "-m", "mdlib", "fetch", name]
    answer = subprocess.run(words, cwd=ROOT, env=os.environ | own, capture_output=True, text=True)
    assert answer.returncode == code, answer.stderr
    return answer.stdout if code == 0 else next(one for one in answer.stderr.splitlines() if one.startswith("mdlib: "))


def test_a_file_of_the_hub_comes_with_what_the_hub_states_of_it(hub, tmp_path):
    printed = fetched("vavae", hub.address, tmp_path)
    assert "its licence is mit" in printed and f"0 MB, sha256 {SUM}" in printed
    *_, path, use = printed.splitlines()
    assert open(path, "rb").read() == CONTENT and use.endswith(f"-p codec_start={path}")
    *_, path, use = fetched("dinov2-small", hub.address, tmp_path).splitlines()
    assert use.endswith("-p foundation=facebook/dinov2-small")
    code = (
        "from huggingface_hub import hf_hub_download as get; print(get('facebook/dinov2-small', 'model.safetensors'))"
    )
    own = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}  # as the foundation is loaded by its name
    answer = subprocess.run([sys.executable, "-c", code], env=os.environ | own, capture_output=True, text=True)
    assert open(answer.stdout.strip(), "rb").read() == CONTENT, answer.stderr


def test_a_damaged_file_of_the_hub_is_refused_and_replaced(hub, tmp_path):
    place = f"/{VAVAE.source}/resolve/main/{VAVAE.files[0]}"
    hub.pages[place], hub.stated = CONTENT[:100], len(CONTENT)
    assert "cannot be downloaded" in fetched("vavae", hub.address, tmp_path, 1)
    hub.pages[place], hub.stated = CONTENT[::-1], None
    assert "differed from what the hub states and was removed" in fetched("vavae", hub.address, tmp_path, 1)
    hub.pages[place] = CONTENT
    assert open(fetched("vavae", hub.address, tmp_path).splitlines()[-2], "rb").read() == CONTENT


def test_without_a_network_one_line_says_what_to_attach(tmp_path):
    line = fetched("vavae", "http://127.0.0.1:9", tmp_path, 1)
    for text in (VAVAE.source, VAVAE.files[0], "attach it as a data set", "-p codec_start=FILE"):
        assert text in line
    assert "choose one of vavae, lightningdit, dinov2" in message(fetch_weights, "gan")


def test_torchvisions_files_are_those_that_are_loaded():
    from torchvision.models import get_weight

    files = {get_weight(one.source).url.rpartition("/")[2] for one in PUBLISHED.values() if not one.files}
    assert files == {INCEPTION, *LPIPS_BACKBONES.values()}


def test_a_file_of_torchvision_is_verified_by_its_name(server, tmp_path, monkeypatch, capsys):
    name = f"net-{SUM[:8]}.pth"
    weights = SimpleNamespace(url=f"{server.address}/{name}", meta={"_file_size": 4.7})
    monkeypatch.setattr("torchvision.models.get_weight", lambda _: weights)
    monkeypatch.setattr("mdlib.models.pretrained.INPUTS", tmp_path / "input")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "hub" / "checkpoints"
    line = message(fetch_weights, "lpips")
    assert f"{name} cannot be downloaded (HTTP Error 404" in line and f"put it into {folder}" in line
    server.pages[f"/{name}"] = CONTENT[:-1]
    assert "invalid hash value" in message(fetch_weights, "lpips") and not list(folder.iterdir())
    server.pages[f"/{name}"] = CONTENT
    assert fetch_weights("lpips").read_bytes() == CONTENT
    assert f"5 MB, sha256 {SUM[:8]}…" in capsys.readouterr().out
    server.pages.clear()
    assert fetch_weights("lpips") == folder / name, "it is there already"
    (folder / name).write_bytes(b"cut off")
    assert "cannot be downloaded" in message(fetch_weights, "lpips")
    (folder / name).unlink()
    (tmp_path / "input" / "somebody" / "files").mkdir(parents=True)
    (tmp_path / "input" / "somebody" / "files" / name).write_bytes(CONTENT)
    assert fetch_weights("lpips").read_bytes() == CONTENT, "attached on Kaggle"
