"""The folder kaggle/: metadata that pass the official client's checks, and the client against a local server."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nbformat
import pytest
from helpers import ROOT, write_set

sys.path.insert(0, str(ROOT / "kaggle"))
import metadata  # noqa: E402
import push  # noqa: E402
import wheelhouse  # noqa: E402
from metadata import BEFORE, Kernel, Stop, write_kernel  # noqa: E402

INPUTS = ("mdlib-wheels", "mdlib-windows")


class Kaggle(ThreadingHTTPServer):
    """The endpoints that are used. `calls` holds the requests; answers may be changed."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.calls: list[tuple[str, dict]] = []
        self.uploads: dict[str, bytes] = {}
        self.statuses = ["COMPLETE"]  # of the run, one after the other; the last one stays
        self.events: list[str] = []  # of the run's log
        self.breaks_after = 0  # events, once
        self.outputs: dict[str, bytes] = {}
        self.dataset = ["NONE", "READY"]  # status of the data set likewise
        self.answers: dict[str, dict] = {}  # further fields by request

    def of(self, name):
        return [body for call, body in self.calls if call == name]

    def answer(self, name, body):
        if name == "SaveKernel":
            return {"versionNumber": 3, "url": "https://kaggle/code", "ref": body["slug"]}
        if name == "GetKernelSessionStatus":
            return {"status": self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]}
        if name == "ListKernelSessionOutput":
            return {"files": [{"fileName": name, "url": f"{self.url}/file/{name}"} for name in self.outputs]}
        if name == "GetDatasetStatus":
            return {"status": self.dataset.pop(0) if len(self.dataset) > 1 else self.dataset[0]}
        if name == "StartBlobUpload":
            return {"token": body["name"], "createUrl": f"{self.url}/upload/{body['name']}"}
        return {"status": "ok", "url": "https://kaggle/data"}


class Handler(BaseHTTPRequestHandler):
    def reply(self, content, kind="application/json", code=200, length=None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length or len(content)))
        self.end_headers()
        self.wfile.write(content)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self):
        name, body = self.path.split("/")[-1], json.loads(self.body() or b"{}")
        self.server.calls.append((name, body))
        answer = self.server.answer(name, body) | self.server.answers.get(name, {})
        missing = answer.get("status") == "NONE"
        self.reply({"code": 404, "message": "Not found"} if missing else answer, code=404 if missing else 200)

    def do_PUT(self):
        size = self.headers.get("Content-Length")
        content = self.body() if size else self.chunks()
        self.server.uploads[self.path.split("/")[-1]] = content
        self.reply({})

    def chunks(self):
        content = b""
        while length := int(self.rfile.readline(), 16):
            content += self.rfile.read(length)
            self.rfile.readline()
        return content

    def do_GET(self):
        if self.path.startswith("/file/"):
            return self.reply(self.server.outputs[self.path.removeprefix("/file/")], "application/octet-stream")
        events = [{"stream_name": "stdout", "time": n, "data": text} for n, text in enumerate(self.server.events)]
        if self.server.statuses[0] == "COMPLETE" and not self.server.breaks_after:
            return self.reply(events)  # a finished run's log is one list
        known, self.server.breaks_after = self.server.breaks_after, 0
        sent = "".join(f"data: {json.dumps(event)}\n\n" for event in events[: known or None])
        end = "" if known else "data: END_OF_LOG\n\n"
        # A connection that breaks: more was announced than comes.
        self.reply((sent + end).encode(), "text/event-stream", length=10**6 if known else None)
        self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture
def kaggle(monkeypatch, tmp_path):
    """A server in Kaggle's place, for a user called me."""
    from kagglesdk import kaggle_env

    server = Kaggle()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, server.url)
    ours = {"HOME": str(tmp_path), "KAGGLE_USERNAME": "me", "KAGGLE_KEY": "k", "NO_PROXY": "*", "no_proxy": "*"}
    for key, value in ours.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("KAGGLE_API_TOKEN", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(push, "POLL", 0)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def call(monkeypatch, capsys):
    """Calls push.py with arguments: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["push.py", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            push.main()
        return end.value.code or 0, *capsys.readouterr()

    return run


def test_the_clients_package_and_this_folder_do_not_meet():
    assert not (ROOT / "kaggle" / "__init__.py").exists()
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import kaggle; print(kaggle.__version__)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert answer.stdout.split()[-1:] == [metadata.pins()["kaggle"]], answer.stderr


@pytest.mark.parametrize("notebook, internet", [(name, number % 2 == 0) for number, name in enumerate(BEFORE)])
def test_the_client_takes_every_notebooks_metadata(notebook, internet, kaggle, tmp_path, capsys):
    kernel = Kernel(notebook, "me", internet=internet, datasets=(*INPUTS, "you/others"))
    folder = write_kernel(kernel, tmp_path / "kernel", {})
    push.push(push.connect(), folder)
    assert "does not resolve" not in capsys.readouterr().out, "the title would give the page another name"
    (request,) = kaggle.of("SaveKernel")
    assert request["slug"] == kernel.id and request["kernelType"] == "notebook" and request["language"] == "python"
    assert request["enableInternet"] is internet and request["isPrivate"] is True
    assert request["enableGpu"] is True and request["machineShape"] == "NvidiaTeslaT4"
    assert request["datasetDataSources"] == ["me/mdlib-wheels", "me/mdlib-windows", "you/others"]
    before = BEFORE[notebook].replace("_", "-")
    assert request.get("kernelDataSources", []) == ([f"me/mdlib-{before}"] if before else [])
    cells = json.loads(request["text"])["cells"]
    assert any("NvidiaTeslaT4" in cell["source"] for cell in cells)


def test_a_resumed_run_reads_its_own_last_output_and_a_tag_distinguishes_runs():
    request = Kernel("03_train_prior", "me", tag="few", resume=True, accelerator="").metadata
    assert request["id"] == "me/mdlib-03-train-prior-few" and request["enable_gpu"] is False
    assert request["kernel_sources"] == ["me/mdlib-02-train-vqvae-few", "me/mdlib-03-train-prior-few"]
    other = Kernel("05_generate", "me", after="04_train_diffusion").metadata
    assert other["kernel_sources"] == ["me/mdlib-04-train-diffusion"]
    with pytest.raises(Stop, match="tag 'Few windows': use up to 20 lower-case letters"):
        Kernel("02_train_vqvae", "me", tag="Few windows")


def test_parameters_override_the_notebooks_own(tmp_path):
    given = {"codec_options": {"beta": 0.5}, "windows_per_user": 20}
    write_kernel(Kernel("02_train_vqvae", "me"), tmp_path, given)
    notebook = nbformat.read(tmp_path / "02_train_vqvae.ipynb", as_version=4)
    nbformat.validate(notebook)
    names: dict = {}
    for cell in notebook.cells:
        if set(cell.metadata.get("tags", [])) & {"parameters", "injected-parameters"}:
            exec(cell.source, names)
    assert names["windows_per_user"] == 20 and names["codec_options"] == {"beta": 0.5} and names["seed"] == 0


@pytest.mark.parametrize(
    "notebook, parameters, resume, message",
    [
        ("02_train_vqvae", {"sed": 3}, False, "has no parameter 'sed'; there are"),
        ("02_train_vqvae", {"windows_per_user": "abc"}, False, "windows_per_user must be of type int"),
        ("02_train_vqvae", {"system": "vae-difusion"}, False, "unknown system 'vae-difusion'"),
        ("02_train_vqvae", {"preset": "hug"}, False, "unknown preset 'hug'"),
        ("03_train_prior", {"seed": 3}, False, "seed: settings of a run are given to notebook 02"),
        ("02_train_vqvae", {"seed": 3}, True, "a resumed run keeps its settings: leave out seed"),
    ],
)
def test_a_parameter_that_would_be_ignored_is_refused(notebook, parameters, resume, message, tmp_path):
    with pytest.raises(Stop, match=message):
        write_kernel(Kernel(notebook, "me", resume=resume), tmp_path / "kernel", parameters)
    assert not (tmp_path / "kernel").exists()
    write_kernel(Kernel(notebook, "me", resume=resume), tmp_path / "kernel", {"max_minutes": 30})


def test_one_command_pushes_shows_the_log_once_and_fetches_the_output(kaggle, call, tmp_path):
    kaggle.statuses = ["QUEUED", "RUNNING", "RUNNING", "COMPLETE"]
    kaggle.events = ["first\n", "second\n", "third\n"]
    kaggle.breaks_after = 2
    kaggle.outputs = {"runs/demo/run.json": b"{}", "runs/demo/codec/state.pt": b"large"}
    code, printed, err = call("kernel", "02", "-p", "seed=3", "--out", tmp_path / "out")
    assert code == 0, err
    assert re.findall("first|second|third", printed) == ["first", "second", "third"]
    output = tmp_path / "out" / "mdlib-02-train-vqvae" / "output"
    assert [path.name for path in output.rglob("*") if path.is_file()] == ["run.json"], "checkpoints stay there"
    assert "me/mdlib-02-train-vqvae: complete; 1 files in" in printed


def test_a_run_that_fails_is_reported_in_one_line(kaggle, call, tmp_path):
    kaggle.statuses, kaggle.events = ["ERROR"], ["DataError: no windows\n"]
    kaggle.answers["GetKernelSessionStatus"] = {"failureMessage": "cell 5\nraised"}
    code, printed, err = call("kernel", "02", "--out", tmp_path)
    assert code == 1 and "DataError: no windows" in printed
    assert err.strip() == "push: me/mdlib-02-train-vqvae ended with ERROR: cell 5 raised"


def test_what_kaggle_refuses_is_reported_in_one_line(kaggle, call, tmp_path):
    kaggle.answers["SaveKernel"] = {"invalidDatasetSources": ["me/mdlib-windows"]}
    code, _, err = call("kernel", "02", "--out", tmp_path)
    assert code == 1 and err.count("\n") == 1
    assert "version 3 was started without me/mdlib-windows" in err
    kaggle.answers["SaveKernel"] = {"error": "Maximum weekly GPU quota reached"}
    code, _, err = call("kernel", "02", "--out", tmp_path)
    assert code == 1 and err.strip().endswith("Kaggle refused the notebook: Maximum weekly GPU quota reached")


def test_without_credentials_nothing_is_pushed(kaggle, call, tmp_path, monkeypatch):
    from kaggle.api.kaggle_api_extended import KaggleApi

    monkeypatch.delenv("KAGGLE_USERNAME")
    monkeypatch.setattr(KaggleApi, "config", str(tmp_path / "kaggle.json"))
    code, printed, err = call("kernel", "02", "--out", tmp_path)
    expected = "push: no Kaggle credentials: run kaggle auth login, or set KAGGLE_API_TOKEN"
    assert (code, printed, err.strip()) == (1, "", expected)
    assert not kaggle.of("SaveKernel")


def test_windows_become_a_private_data_set_and_then_its_next_version(kaggle, call, tmp_path):
    people = write_set(tmp_path / "people")
    kaggle.dataset = ["NONE", "NONE", "BLOBS_RECEIVED", "READY"]
    code, printed, err = call("dataset", people, "--name", "mdlib-windows")
    assert code == 0, err
    (request,) = kaggle.of("CreateDataset")
    assert request["isPrivate"] is True and (request["ownerSlug"], request["slug"]) == ("me", "mdlib-windows")
    assert sorted(entry["token"] for entry in request["files"]) == ["ID_1.zip", "ID_2.zip"]
    (tmp_path / "one.zip").write_bytes(kaggle.uploads["ID_1.zip"])
    assert len(zipfile.ZipFile(tmp_path / "one.zip").namelist()) == 3, "Kaggle unpacks it to ID_1/"
    assert "me/mdlib-windows: ready" in printed
    code, _, err = call("dataset", people, "--name", "mdlib-windows", "--message", "more")
    assert code == 0, err
    (request,) = kaggle.of("CreateDatasetVersion")
    assert request["body"]["versionNotes"] == "more" and len(request["body"]["files"]) == 2
    code, _, err = call("dataset", people, "--name", "another-name")
    assert code == 1 and "belongs to me/mdlib-windows: give that name, or delete the file" in err


def fake_wheel(folder: Path, name: str, tag: str = "py3-none-any") -> None:
    folder.mkdir(exist_ok=True)
    module, release = name.replace("-", "_"), metadata.pins()[name]
    about = f"{module}-{release}.dist-info"
    with zipfile.ZipFile(folder / f"{module}-{release}-{tag}.whl", "w") as wheel:
        wheel.writestr(f"{module}.py", "")
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n")
        wheel.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        wheel.writestr(f"{about}/RECORD", "")


def test_the_wheelhouse_installs_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    for name in wheelhouse.LACKING:
        fake_wheel(tmp_path / "index", name)
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "mdlib-0.0.1-py3-none-any.whl").touch()  # of before
    files = [path.name for path in wheelhouse.build(tmp_path / "house")]
    wheels = [name for name in files if name.endswith(".whl")]
    assert sorted(name.split("-")[0] for name in wheels) == ["lpips", "mdlib", "pytorch_metric_learning"]
    assert all(name.endswith("-py3-none-any.whl") for name in wheels), "for every Python version"
    scripts = {"check_environment.py", "setup_environment.py", "install_mdlib.py", "pyproject.toml"}
    assert set(files) - set(wheels) == scripts
    target = tmp_path / "installed"
    house = [str(tmp_path / "house" / name) for name in wheels]
    wheelhouse.pip("install", "--no-index", "--no-deps", "--target", target, *house)
    sources, installed = (
        {path.relative_to(root) for kind in ("*.py", "*.html") for path in root.rglob(kind)}
        for root in (ROOT / "mdlib", target / "mdlib")
    )
    assert installed == sources, "rooms and templates, too"
    assert not (ROOT / "build").exists() or "mdlib" not in [path.name for path in (ROOT / "build").iterdir()]


def test_a_wheel_for_one_machine_stays_out(tmp_path, monkeypatch):
    import packaging.tags

    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    fake_wheel(tmp_path / "index", "lpips", str(next(packaging.tags.sys_tags())))
    fake_wheel(tmp_path / "index", "pytorch-metric-learning")
    with pytest.raises(Stop, match="lpips.* is built for one Python version or machine"):
        wheelhouse.build(tmp_path / "house")
    assert not (tmp_path / "house").exists()


def first_cells() -> dict[str, str]:
    """The cell of every notebook that installs mdlib."""
    cells = {}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        cells[path.stem] = code[1]
        assert "import" not in code[0], "nothing needs mdlib before it is installed"
    return cells


@pytest.mark.parametrize("mount", ["wheels", "datasets/me/wheels"])
def test_notebooks_install_the_wheels_they_find_if_mdlib_is_missing(mount, tmp_path, monkeypatch):
    (source,) = set(first_cells().values())
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, **options: commands.append(command))
    exec(source, {})
    assert commands == [], "mdlib is installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    source = source.replace("/kaggle/input", str(tmp_path))
    with pytest.raises((IndexError, RuntimeError)):
        exec(source, {})
    (tmp_path / mount).mkdir(parents=True)
    shutil.copy(ROOT / "kaggle" / "install_mdlib.py", tmp_path / mount)
    for name in ("mdlib-0.1.0-py3-none-any.whl", "lpips-0.1.4-py3-none-any.whl", "pyproject.toml"):
        (tmp_path / mount / name).touch()
    exec(source, {})
    assert commands[0][1:7] == ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    assert [Path(name).name.split("-")[0] for name in commands[0][7:]] == ["lpips", "mdlib"]


@pytest.mark.parametrize("name", ["docs/kaggle.md", "kaggle/README.md", "kaggle/README.zh-CN.md"])
def test_the_guides_commands_are_valid(name, call, tmp_path):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert f"kaggle=={metadata.pins()['kaggle']} six=={metadata.pins()['six']}" in text
    commands = re.findall(r"^python kaggle/push\.py kernel (.+?)(?: +#.*)?$", text, re.MULTILINE)
    assert len(commands) > 4
    for number, command in enumerate(commands):
        words = [word.strip("'") for word in command.split()]
        code, _, err = call("kernel", *words, "--prepare", "--owner", "me", "--out", tmp_path / str(number))
        assert code == 0, f"{command}: {err}"
