"""The views in a real browser: Voila serves the notebooks, Chromium moves their controls; screenshots stay in runs/.

Needs Debian's package chromium and `python setup_environment.py install --extra test --extra browser`; run with
`-m slow`.
"""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from helpers import ROOT
from papermill.iorw import load_notebook_node, write_ipynb
from papermill.parameterize import parameterize_notebook

pytestmark = pytest.mark.slow

SCREENSHOTS = ROOT / "runs" / "browser"
PATIENCE = 600_000  # ms; a notebook runs within it, also on a busy machine
HERE = "http://127.0.0.1"
UNSHARED = "jupyterlab-jupytext"  # JupyterLab's extension of a dependency of kaggle: Voila lacks what it shares


@pytest.fixture(scope="module")
def browser():
    """A page of headless Chromium; nothing but this machine answers it."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium or not all(importlib.util.find_spec(name) for name in ("playwright", "voila")):
        pytest.fail(
            "the browser tests need chromium (apt-get install chromium) and the extra browser "
            "(python setup_environment.py install --extra browser)",
            pytrace=False,
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Its sandbox starts not as root; the pages are our own.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the smoke preset on three simulated users, to where windows are generated."""
    folder = tmp_path_factory.mktemp("browser")
    mdlib(folder, "simulate", "--out", "people", "--users", "3", "--windows", "40", "--size", "64")
    steps = ["-p", "codec_steps=60", "-p", "prior_steps=20"]
    mdlib(folder, "run", "--preset", "smoke", "--data", "people", "--out", "run", "--to", "05", *steps)
    return folder / "run"


def mdlib(folder, *words):
    done = subprocess.run(
        [sys.executable, "-m", "mdlib", *words], cwd=folder, env=environment(folder), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def environment(folder):
    unset = {key: value for key, value in os.environ.items() if key != "MDLIB_BATCH"}
    return {**unset, "PYTHONPATH": str(ROOT), "MDLIB_CACHE": str(folder / "cache")}


def parameterized(name, run):
    return parameterize_notebook(load_notebook_node(str(ROOT / "notebooks" / f"{name}.ipynb")), {"out": str(run)})


@contextmanager
def served(name, run, browser):
    """A page with the notebook, live on the run; errors of the console are collected."""
    path = run.parent / f"{name}.ipynb"
    write_ipynb(parameterized(name, run), str(path))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["-m", "voila", str(path), "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1"]
    words += [f"--VoilaConfiguration.extension_denylist={UNSHARED}"]
    log = run.parent / f"{name}.log"
    with open(log, "w") as stream:
        server = subprocess.Popen(
            [sys.executable, *words], cwd=run.parent, env=environment(run.parent), stdout=stream, stderr=stream
        )
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.set_default_timeout(PATIENCE)
        errors: list[str] = []
        page.on("console", lambda message: message.type == "error" and errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        elsewhere(page)
        try:
            wait_for(port, server, log)
            page.goto(f"{HERE}:{port}/", timeout=PATIENCE)
            yield SimpleNamespace(page=page, errors=errors)
            assert not errors, errors
        finally:
            page.close()
            server.terminate()
            server.wait()


def elsewhere(page):
    """Other hosts answer nothing: the templates of Voila and nbconvert ask them for icons that no page here needs."""
    page.route(lambda url: not url.startswith((HERE, "file:", "data:")), lambda route: route.fulfill(body=""))


def wait_for(port, server, log):
    for _ in range(PATIENCE // 500):
        assert server.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError(log.read_text())


def picture(page, place=0):
    """The bytes of a view's picture, once it is there."""
    image = page.locator("img.widget-image").nth(place)
    image.wait_for()
    source = image.get_attribute("src")
    return page.evaluate("source => fetch(source).then(r => r.text())", source)


def changed(page, before, place=0):
    """The picture that has taken the place of `before`."""
    deadline = time.monotonic() + PATIENCE / 1000
    while (now := picture(page, place)) == before:
        assert time.monotonic() < deadline, "the picture did not change"
        page.wait_for_timeout(200)
    return now


def screenshot(page, name, of=".widget-vbox"):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(500)
    page.locator(of).first.screenshot(path=SCREENSHOTS / f"{name}.png")


def test_the_user_browser_follows_its_controls(run, browser):
    with served("05_generate", run, browser) as live:
        page = live.page
        first = picture(page)
        screenshot(page, "user_browser")
        page.locator(".widget-slider .noUi-handle, .ui-slider-handle").first.press("ArrowRight")
        second = changed(page, first)
        assert page.locator(".widget-readout").first.inner_text() == "ID_2"
        seed = page.get_by_label("seed")
        seed.fill("5")
        seed.press("Enter")
        third = changed(page, second)
        page.get_by_role("button", name="select 2").click()
        page.get_by_role("button", name="save selected").click()
        page.get_by_text("1 window of ID_2 saved in").wait_for()
        screenshot(page, "user_browser_live")
        page.locator(".noUi-handle, .ui-slider-handle").last.press("ArrowRight")
        changed(page, third)
        contact = page.locator(".jp-RenderedImage img, .output_png img").first
        assert contact.bounding_box()["width"] > 300, "figures are pictures"
    assert [path.name for path in run.glob("selected/ID_2/*.png")] == ["ID2_generated_seed5_2.png"]
    assert len((run / "selected" / "manifest.csv").read_text().splitlines()) == 2


def test_a_code_is_shown_by_its_number(run, browser):
    with served("02_train_vqvae", run, browser) as live:
        page = live.page
        usage, tiles, card = (picture(page, place) for place in range(3))
        screenshot(page, "codebook_explorer")
        code = page.get_by_label("code", exact=True)
        code.fill(str(int(code.input_value()) // 2 + 1))
        code.press("Enter")
        changed(page, card, 2)
        page.get_by_label("codes of").select_option(label="ID_2")
        changed(page, usage, 0)
        changed(page, tiles, 1)
        screenshot(page, "codebook_explorer_of_a_user")


def test_a_page_that_is_not_live_shows_the_picture(run, browser):
    """A notebook that was executed live and is opened where there is no kernel, as nbconvert and GitHub show it."""
    from nbclient import NotebookClient
    from nbconvert import HTMLExporter

    notebook = parameterized("05_generate", run)
    client = NotebookClient(notebook, timeout=None, store_widget_state=False, kernel_name="python3")
    client.execute(env=environment(run.parent), cwd=str(run.parent))
    text, _ = HTMLExporter().from_notebook_node(notebook)
    path = run.parent / "static.html"
    path.write_text(text, encoding="utf-8")
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    elsewhere(page)
    page.goto(path.as_uri())
    last = page.locator(".jp-RenderedImage img").last
    assert page.locator(".jp-RenderedImage img").count() == 2, "the contact sheet, and the user browser's picture"
    assert last.bounding_box()["width"] > 300 and not page.get_by_text("an interactive view").count()
    last.screenshot(path=SCREENSHOTS / "static_html.png")
    page.close()
