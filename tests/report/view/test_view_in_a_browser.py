"""The viewer and the report as a person uses them: in headless Chromium, on a run that was trained.

Screenshots are written where TEXTPOLICY_SCREENSHOTS names a folder, of the run that TEXTPOLICY_RUN names if it does;
those of the documentation are in docs/img, of a run of the built-in model.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_run import IMAGE, SCRIPT, make_run
from trained_run import train_run

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
pytest.importorskip("starlette", reason="the viewer is textpolicy[view]")

from textpolicy.analysis import load_run  # noqa: E402
from textpolicy.report.page import write_report  # noqa: E402

CHROMIUM = os.environ.get("TEXTPOLICY_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium: install the package chromium, or name one in TEXTPOLICY_CHROMIUM"
    ),
]


def command(*arguments):
    return [sys.executable, "-m", "textpolicy", *map(str, arguments)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One that was trained, and two made up, with hostile completions."""
    root = tmp_path_factory.mktemp("runs")
    named = os.environ.get("TEXTPOLICY_RUN")
    return [
        Path(named) if named else train_run(root / "trained"),
        make_run(root / "first", 0),
        make_run(root / "second", 1),
    ]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page that fails the test when anything but this machine is asked, or a script runs or breaks."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.asked, page.errors = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("dialog", lambda dialog: page.errors.append(dialog.message))
    yield page
    assert page.errors == []
    assert [url for url in page.asked if not url.startswith(("http://127.0.0.1:", "file:", "data:"))] == []
    context.close()


class Viewer:
    """`textpolicy view` in a process of its own."""

    def __init__(self, *folders):
        self.process = subprocess.Popen(command("view", *folders), stdout=subprocess.PIPE, text=True)
        self.address = self.process.stdout.readline().split()[0]

    def __enter__(self):
        return self.address

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait()
        self.process.stdout.close()


def shoot(page, name):
    """The page at two widths, in light and dark, if anybody wants pictures."""
    folder = os.environ.get("TEXTPOLICY_SCREENSHOTS")
    if folder is None:
        return
    for width in (1280, 400):
        for scheme in ("light", "dark"):
            page.set_viewport_size({"width": width, "height": 800})
            page.emulate_media(color_scheme=scheme)
            page.screenshot(path=str(Path(folder) / f"{name}-{width}-{scheme}.png"))
    page.set_viewport_size({"width": 1280, "height": 900})
    page.emulate_media(color_scheme="light")


def fits(page):
    """Nothing makes the page scroll sideways at the width of a telephone."""
    page.set_viewport_size({"width": 400, "height": 800})
    wide = page.evaluate("document.documentElement.scrollWidth")
    page.set_viewport_size({"width": 1280, "height": 900})
    return wide <= 400


def shown(page):
    return int(re.search(r"[\d,]+", page.inner_text("#count"))[0].replace(",", ""))


def test_a_trained_run_is_filtered_opened_and_coloured(page, runs):
    steps = load_run(runs[0]).rollouts["step"].to_pylist()
    with Viewer(runs[0]) as address:
        page.goto(address)
        assert shown(page) == len(steps)
        assert fits(page)
        shoot(page, "view-list")
        page.fill("input[name=step_from]", "2")
        page.fill("input[name=step_to]", "2")
        page.click("button")
        assert shown(page) == steps.count(2)
        page.select_option("select[name=sort]", "advantage")
        page.click("button")
        page.click(".list .line >> nth=0")
        drawn = page.locator(".tokens span")
        assert drawn.count() > 0
        assert fits(page)
        plain = page.locator(".tokens span").first.evaluate("e => getComputedStyle(e).backgroundColor")
        page.click(".choice a:has-text('surprisal')")
        classes = page.locator(".tokens span").evaluate_all("all => all.map(e => e.className)")
        assert any("much8" in c for c in classes)
        strongest = page.locator(".tokens .much8").first.evaluate("e => getComputedStyle(e).backgroundColor")
        assert strongest != plain
        shoot(page, "view-completion")
        page.click("a.beside >> nth=0")
        assert page.locator(".pair .tokens").count() == 2
        assert fits(page)
        shoot(page, "view-pair")


def test_two_runs_are_compared_on_one_prompt(page, runs):
    with Viewer(*runs[1:]) as address:
        page.goto(address)
        page.click("text=Compare prompts")
        assert fits(page)
        page.click("tbody a >> nth=0")
        page.wait_for_selector(".pair h2")
        headings = page.locator(".pair h2").all_inner_texts()
        assert headings[0].startswith("first")
        assert headings[1].startswith("second")
        page.click(".choice a:has-text('credit')")
        assert page.locator(".pair .tokens").count() == 2


def test_markup_that_a_model_wrote_is_text_in_a_browser(page, runs):
    with Viewer(runs[1]) as address:
        page.goto(address + "?words=%3Cscript%3E")
        title = page.title()
        assert SCRIPT in page.inner_text(".list")
        page.click(".list .line >> nth=0")
        assert SCRIPT in page.inner_text(".tokens")
        page.goto(address + "?words=onerror")
        assert IMAGE in page.inner_text(".list")
        assert page.locator("main script, main img").count() == 0
        assert page.title() == title


def test_the_report_is_read_from_a_file(page, runs, tmp_path):
    write_report(runs[:1], tmp_path / "report.html")
    page.goto((tmp_path / "report.html").as_uri())
    assert page.locator("svg").count() >= 8
    assert page.locator("main script, img").count() == 0
    assert fits(page)
    ink = [page.locator("svg text").first.evaluate("e => getComputedStyle(e).fill")]
    page.emulate_media(color_scheme="dark")
    ink.append(page.locator("svg text").first.evaluate("e => getComputedStyle(e).fill"))
    assert ink[0] != ink[1]
    shoot(page, "report")
