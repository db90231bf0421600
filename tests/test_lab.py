"""Exported notebooks in a real JupyterLab, in a real browser; the pictures are kept in `.screenshots`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from kernel_env import Episode

from .gallery import pictures, recursion, trouble

CHROMIUM = shutil.which("chromium")
PICTURES = Path(__file__).parent.parent / ".screenshots"
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # or cells out of sight are not in the page
    "apputils-extension/notification": {"fetchNews": "false"},
}

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; apt-get install chromium"),
    pytest.mark.xdist_group("lab"),
]


class Lab(NamedTuple):
    address: str
    theme: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gallery")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERNEL_ENV_SPARES", "0")  # as in every test
        for make in (pictures, trouble, recursion):
            make(folder)
    return folder


@pytest.fixture(scope="module", params=["Light", "Dark"])
def lab(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lab]:
    """A JupyterLab over the gallery."""
    home = tmp_path_factory.mktemp("lab")
    themes = {"apputils-extension/themes": {"theme": f"JupyterLab {request.param}"}}
    for name, values in {**SETTINGS, **themes}.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    env = {
        **os.environ,
        **{f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")},
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--port=0",
        "--expose-app-in-browser",
    ]
    command += ["--IdentityProvider.token=t", f"--ServerApp.root_dir={folder}"]
    with (
        open(home / "log", "wb") as log,
        subprocess.Popen(command, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL) as server,
    ):
        try:
            yield Lab(_address(home / "runtime", server), request.param)
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:  # it waits for a kernel that was starting
                server.kill()


def _address(runtime: Path, server: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        for file in runtime.glob("jpserver-*.json"):
            found: str = json.loads(file.read_text())["url"]
            return found
        time.sleep(0.1)  # the server tells nobody when the file is there
    raise AssertionError((runtime.parent / "log").read_text())


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1200, "height": 1500})
    context.set_default_timeout(60_000)
    yield context.new_page()
    context.close()


def open_notebook(page: Page, lab: Lab, name: str) -> None:
    page.goto(f"{lab.address}lab/tree/{name}.ipynb?token=t&reset")
    expect(page.locator(".jp-Notebook")).to_be_visible(timeout=60_000)
    expect(page.locator(".jp-Notebook h1")).to_contain_text("Episode")
    expect(page.locator(".jp-Dialog")).to_have_count(0)
    expect(page.locator(f'body[data-jp-theme-name="JupyterLab {lab.theme}"]')).to_have_count(1)
    page.keyboard.press("Control+b")  # the file browser takes a fourth of the picture
    PICTURES.mkdir(exist_ok=True)


def keep(page: Page, lab: Lab, name: str) -> None:
    page.screenshot(path=PICTURES / f"{name}-{lab.theme.lower()}.png")


def test_a_solved_episode_shows_its_pictures_and_calls_and_is_saved_as_it_was(
    page: Page, lab: Lab, folder: Path
) -> None:
    open_notebook(page, lab, "pictures")
    notebook = page.locator(".jp-Notebook")
    expect(notebook.locator("table").first).to_contain_text("Answer")
    expect(notebook.locator("table").first).to_contain_text("Expected")
    expect(notebook.locator(".jp-OutputArea img")).to_be_visible()
    call = notebook.locator(".jp-OutputArea details")
    expect(call).to_have_count(1)
    expect(call.locator("summary")).to_contain_text("llm_query_batched(3 prompts)")
    call.scroll_into_view_if_needed()
    call.locator("summary").click()
    expect(call.locator("td").first).to_contain_text("Is a mean wind of")
    expect(call.locator("td").nth(1)).to_be_visible()
    keep(page, lab, "pictures")
    written = Episode.from_notebook(folder / "pictures.ipynb")
    # Its kernel tells JupyterLab what language it has, which is then in the file, too.
    expect(page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]')).to_be_visible(timeout=60_000)
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    expect(page.locator(".jp-Dialog")).to_have_count(0)
    assert "codemirror_mode" in (folder / "pictures.ipynb").read_text("utf-8")  # so JupyterLab has written it
    assert Episode.from_notebook(folder / "pictures.ipynb") == written


def test_errors_a_time_out_and_a_restart_are_told(page: Page, lab: Lab) -> None:
    open_notebook(page, lab, "trouble")
    headings = page.locator(".jp-Notebook h2")
    expect(headings).to_have_count(5)
    for words in ("timeout", "a fresh kernel took over", "died"):
        expect(page.locator(".jp-MarkdownOutput", has_text=words).first).to_be_visible()
    keep(page, lab, "trouble")


def test_children_are_links_that_open(page: Page, lab: Lab) -> None:
    open_notebook(page, lab, "recursion")
    notebook = page.locator(".jp-Notebook")
    expect(notebook.locator("h2 + p + p em")).to_have_text("size")
    link = notebook.locator("a", has_text="Count the word exception.").first
    link.scroll_into_view_if_needed()
    keep(page, lab, "recursion")
    link.click()
    expect(page.locator(".jp-Notebook:visible h1")).to_contain_text("Episode")
    expect(page.locator(".lm-TabBar-tabLabel", has_text="recursion-child-1.ipynb")).to_be_visible()
    expect(page.locator(".jp-Dialog")).to_have_count(0)
