"""The viewer and the report as a person uses them: in headless Chromium, on small runs and on a large one.

Screenshots are written where TEXTPOLICY_SCREENSHOTS names a folder, of the run that TEXTPOLICY_RUN names if it does;
those of the documentation are in docs/img, of a run of the built-in model.
"""

import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_run import IMAGE, SCRIPT, make_run
from served import TOKEN, Served

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
pytest.importorskip("starlette", reason="the viewer is textpolicy[view]")

from textpolicy.analysis import load_run  # noqa: E402
from textpolicy.report.page import write_report  # noqa: E402
from textpolicy.report.view.server import make_app  # noqa: E402

CHROMIUM = os.environ.get("TEXTPOLICY_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium: install the package chromium, or name one in TEXTPOLICY_CHROMIUM"
    ),
]


WIDTHS = (1280, 400, 1920)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs made up, with hostile completions."""
    root = tmp_path_factory.mktemp("runs")
    named = os.environ.get("TEXTPOLICY_RUN")
    return [
        Path(named) if named else make_run(root / "plain", 2),
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
    asked = [url for url in page.asked if not url.startswith(("http://127.0.0.1:", "file:", "data:"))]
    assert asked == []
    context.close()


class Viewer(Served):
    """The pages of some folders, at an address."""

    def __init__(self, *folders):
        super().__init__(make_app(folders, TOKEN))

    def __enter__(self):
        super().__enter__()
        return f"http://127.0.0.1:{self.port}/{TOKEN}/"


def shoot(page, name):
    """The page at two widths, in light and dark, if anybody wants pictures."""
    folder = os.environ.get("TEXTPOLICY_SCREENSHOTS")
    if folder is None:
        return
    for width in WIDTHS:
        for scheme in ("light", "dark"):
            page.set_viewport_size({"width": width, "height": 800})
            page.emulate_media(color_scheme=scheme)
            page.screenshot(path=str(Path(folder) / f"{name}-{width}-{scheme}.png"))
    page.set_viewport_size({"width": 1280, "height": 900})
    page.emulate_media(color_scheme="light")


def fits(page):
    """Nothing makes the page scroll sideways at any width, and words stand out from the paper in light and dark."""
    seen = []
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 800})
        seen.append(page.evaluate("document.documentElement.scrollWidth") <= width)
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        colours = page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
        ink, paper = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
        seen.append(abs(ink - paper) > 450 and (ink > paper) == (scheme == "dark"))
    page.set_viewport_size({"width": 1280, "height": 900})
    return all(seen)


def shown(page):
    """How many completions the list has."""
    return int(re.search(r"[\d,]+", page.inner_text("#count"))[0].replace(",", ""))


def becomes(page, count):
    """Wait until the list has so many completions."""
    page.wait_for_selector(f"#count:text-matches('^{count:,} completion')")


def listening(page):
    """Wait for the frame with the keys."""
    page.frame_locator("iframe").locator("head script").wait_for(state="attached")
    page.frames[1].wait_for_load_state()


def focused(page):
    return page.evaluate("(e => e.innerText || e.name)(document.activeElement)")


def test_a_run_is_filtered_opened_and_coloured(page, runs):
    rows = load_run(runs[0]).rollouts.to_pylist()
    with Viewer(runs[0]) as address:
        page.goto(address)
        assert shown(page) == len(rows)
        assert page.locator(".overview").count() == 1
        assert fits(page)
        shoot(page, "view-list")
        listening(page)
        page.fill("input[name=step_from]", "2")
        page.fill("input[name=step_to]", "2")
        becomes(page, sum(r["step"] == 2 for r in rows))
        page.fill("input[name=step_to]", "two")
        page.wait_for_selector("#count:has-text('step_to is two')")
        page.fill("input[name=step_to]", "2")
        page.select_option("select[name=sort]", "advantage")
        page.wait_for_url("**sort=advantage")
        assert focused(page) == "step_to"  # the form is the same, with its focus
        page.reload()
        assert page.input_value("input[name=step_from]") == "2"
        page.click("summary >> nth=0")
        page.click(".members .line >> nth=0")
        assert page.locator(".tokens span").count() > 0
        assert fits(page)
        page.click(".choice a:has-text('surprisal')")
        classes = page.locator(".tokens span").evaluate_all("all => all.map(e => e.className)")
        coloured = next(c for c in classes if "much" in c).split()[0]
        strongest = page.locator(f".tokens .{coloured}").first.evaluate("e => getComputedStyle(e).backgroundColor")
        assert strongest != page.locator(".tokens").evaluate("e => getComputedStyle(e).backgroundColor")
        shoot(page, "view-completion")
        page.click("a.beside >> nth=0")
        assert page.locator(".pair .tokens").count() == 2
        assert fits(page)
        shoot(page, "view-pair")


def test_keys_move_open_and_walk(page, runs):
    with Viewer(runs[1]) as address:
        page.goto(address + "?sort=oldest")
        listening(page)
        lines = page.locator("#results > .list > li > details > summary").all_inner_texts()
        page.keyboard.press("j")
        assert focused(page) == lines[0]
        page.keyboard.press("j")
        assert focused(page) == lines[1]
        page.keyboard.press("k")
        page.keyboard.press("Enter")
        assert page.locator("details[open]").count() == 1
        page.keyboard.press("j")
        assert focused(page).startswith("sample 0")
        page.keyboard.press("Enter")
        page.wait_for_url("**/completion?**")
        for key, sample in (("ArrowRight", 1), ("j", 2), ("k", 1), ("ArrowLeft", 0)):
            listening(page)
            page.keyboard.press(key)
            page.wait_for_selector(f"h1:text-matches('sample {sample}$')")
        listening(page)
        page.keyboard.press("u")
        page.wait_for_selector("#results")
        assert "sort=oldest" in page.url
        listening(page)
        assert focused(page).startswith("sample 0")  # in its group, which is open again
        assert page.locator("details[open]").count() == 1
        page.keyboard.press("/")
        page.keyboard.type("junk j/k")  # in a field a key is a letter
        assert page.input_value("input[name=words]") == "junk j/k"
        becomes(page, 0)
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement === document.body")


def test_a_screen_reader_is_told_what_there_is(page, runs):
    with Viewer(runs[1]) as address:
        page.goto(address)
        tree = page.locator("body").aria_snapshot()
        for part in ('navigation "Pages"', "main", 'heading "first"', 'region "Summary"', 'form "Filter"', "status"):
            assert part in tree, tree
        assert re.search(r'img "reward over steps 0 to 5: from [\d.]+ to [\d.]+, last [\d.]+"', tree)
        assert not re.search(r"(textbox|combobox|searchbox)(?! \")", tree)  # every field has a name
        assert "iframe" not in tree
        page.keyboard.press("Tab")
        assert focused(page) == "Skip to the content"


def test_a_curve_shows_the_value_under_the_pointer_and_a_click_its_completions(page, runs):
    means = {r["step"]: r["reward_mean"] for r in load_run(runs[1]).rows if r["kind"] == "train"}
    with Viewer(runs[1]) as address:
        page.goto(address)
        curve = page.locator(".curves figure", has_text="reward").first
        step = curve.locator(".at").nth(3)
        label = step.locator("text")
        assert not label.is_visible()
        step.hover()
        assert label.is_visible()
        assert label.text_content() == f"step 3: {means[3]:.3g}"
        assert "step 0" in curve.locator("svg > text").all_text_contents()
        step.click()
        page.wait_for_url("**step_from=3&step_to=3")
        assert shown(page) == 12


def large_run(folder, like, files, rows):
    """A run of as many completions as asked for, made of those of another."""
    shutil.copytree(like, folder)
    table = load_run(like).rollouts
    table = pa.concat_tables([table] * -(-rows // len(table))).slice(0, rows).combine_chunks()
    groups = pa.array(np.arange(rows, dtype=np.int32) // 8)
    table = table.set_column(table.schema.get_field_index("group"), "group", groups)
    for step in range(files):
        steps = pa.array(np.full(rows, step, np.int32))
        path = folder / "rollouts" / f"step-{step:06d}.parquet"
        pq.write_table(table.set_column(table.schema.get_field_index("step"), "step", steps), path)
    return folder


def test_a_hundred_thousand_completions_are_listed_and_filtered_at_once(page, runs, tmp_path):
    folder, took = large_run(tmp_path / "large", runs[1], files=100, rows=1000), {}
    with Viewer(folder) as address:
        for name, path in (
            ("first", ""),
            ("again", ""),
            ("spread", "?reward_from=0.5&sort=spread"),
            ("words", "?words=seven"),
        ):
            since = time.process_time()  # seconds of computing here, where the server is: other programs add none
            page.goto(address + path)
            took[name] = time.process_time() - since
            assert path or shown(page) == 100_000
        page.goto(address + "?sort=best")
        listening(page)
        since = time.process_time()
        page.fill("input[name=step_from]", "90")
        becomes(page, 10_000)
        took["typed"] = time.process_time() - since
        assert fits(page)
    print(" ".join(f"{name} {seconds:.2f} s" for name, seconds in took.items()))
    assert max(took[name] for name in ("again", "spread", "words", "typed")) < 5  # under one


def test_two_runs_are_compared_on_one_prompt(page, runs):
    with Viewer(*runs[1:]) as address:
        page.goto(address)
        assert "2 runs" in page.inner_text("h1")
        assert fits(page)
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
        page.click("summary >> nth=0")
        assert SCRIPT in page.inner_text(".list")
        page.click(".members li:not(.other) .line >> nth=0")
        assert SCRIPT in page.inner_text(".tokens")
        page.goto(address)
        listening(page)
        page.fill("input[name=words]", "onerror")
        page.wait_for_url("**words=onerror**")
        page.click("summary >> nth=0")
        assert IMAGE in page.inner_text(".list")
        assert page.locator("main script, main img").count() == 0
        assert page.title() == title


def test_the_report_is_read_from_a_file(page, runs, tmp_path):
    write_report(runs[:1], tmp_path / "report.html")
    page.goto((tmp_path / "report.html").as_uri())
    assert page.locator("svg").count() >= 3  # those that change
    assert page.locator("main script, img").count() == 0
    assert page.inner_text("h2 >> nth=0").startswith("Did it learn? ")
    assert fits(page)
    ink = [page.locator("svg text").first.evaluate("e => getComputedStyle(e).fill")]
    page.emulate_media(color_scheme="dark")
    ink.append(page.locator("svg text").first.evaluate("e => getComputedStyle(e).fill"))
    assert ink[0] != ink[1]
    shoot(page, "report")
