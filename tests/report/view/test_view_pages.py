"""The pages of `textpolicy view`: what they list, who may reach them, and that what a model wrote stays text."""

import html
import re
import shlex
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from html.parser import HTMLParser

import numpy as np
import pytest
from made_run import IMAGE, PROMPTS, SAMPLES, SCRIPT, STEPS, add_step, make_run, spell
from served import TOKEN, Served
from trained_run import train_run

pytest.importorskip("starlette", reason="the viewer is textpolicy[view]")

from textpolicy.analysis import load_run
from textpolicy.cli.main import main
from textpolicy.errors import UserError
from textpolicy.record.recorder import Recorder
from textpolicy.report.view import runs
from textpolicy.report.view.drawing import COLOURINGS, draw
from textpolicy.report.view.index import Index, Query
from textpolicy.report.view.server import make_app

LARGE = ("step_from", "step_to", "group", "prompt", "page", "run")
NUMBERS = ("99999999999999999999", "2147483648", "-1", "1e3", "9" * 5000)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [make_run(root / "first", seed=0), make_run(root / "second", seed=1)]


@pytest.fixture(scope="module")
def one(two_runs):
    with Served(make_app(two_runs[:1], TOKEN)) as served:
        yield served


@pytest.fixture(scope="module")
def both(two_runs):
    with Served(make_app(two_runs, TOKEN)) as served:
        yield served


def count(page):
    return int(re.search(r'id="count">([\d,]+) completion', page)[1].replace(",", ""))


def addresses(page):
    return list(dict.fromkeys(re.findall(r"completion\?at=([^&\"]+)", page)))


class Elements(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text, self.sources = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.sources += [value for name, value in attrs if name in ("src", "srcdoc", "srcset", "data")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_list_has_every_completion(one):
    assert count(one.page()) == STEPS * PROMPTS * SAMPLES
    assert count(one.page("?kind=evals")) == 3 * PROMPTS


@pytest.mark.parametrize(
    ("query", "holds"),
    [
        ("step_from=2&step_to=3", lambda r: 2 <= r["step"] <= 3),
        ("prompt=1", lambda r: r["prompt_index"] == 1),
        ("reward_from=0.5", lambda r: r["reward"] >= 0.5),
        ("reward_to=0.5&finish=length", lambda r: r["reward"] <= 0.5 and r["finish_reason"] == "length"),
        ("correct=no&finish=stop", lambda r: not r["is_correct"] and r["finish_reason"] == "stop"),
        ("words=CHECK", lambda r: "check" in r["text"]),
        ("words=Question+2", lambda r: "Question 2" in r["prompt"]),
        ("words=nobody+says+this", lambda r: False),
        ("split=validation", lambda r: False),
        ("group=0&prompt=&step_from=", lambda r: r["group"] == 0),
    ],
)
def test_a_filter_keeps_what_a_slow_pass_over_every_row_keeps(one, two_runs, query, holds):
    rows = load_run(two_runs[0]).rollouts.to_pylist()
    assert count(one.page("?" + query)) == sum(holds(row) for row in rows)


def test_the_list_is_in_the_requested_order(two_runs):
    index = Index(two_runs[0] / "rollouts")
    index.refresh()
    for sort, column, sign in (
        ("best", "reward", -1),
        ("worst", "reward", 1),
        ("longest", "length", -1),
        ("oldest", "step", 1),
    ):
        values = sign * np.array(index.select(Query(sort=sort))[column].to_pylist())
        assert (np.diff(values) >= 0).all()


def test_pages_follow_one_another_without_gap_or_repeat(one, monkeypatch):
    monkeypatch.setattr(runs, "PER_PAGE", 10)
    pages = [one.page(f"?page={n}") for n in (1, 2)]
    assert 'rel="next"' in pages[0]
    assert 'rel="prev"' in pages[1]
    assert pages[0].count("<details>") == 10
    seen = [address for page in pages for address in addresses(page)]
    assert len(set(seen)) == len(seen) == STEPS * PROMPTS * SAMPLES
    assert addresses(one.page("?page=99")) == addresses(pages[1])


@pytest.mark.parametrize("query", ["", "sort=best", "sort=spread", "correct=no&sort=oldest", "words=check&finish=stop"])
def test_a_group_is_one_line_with_all_its_rewards_and_those_found_stand_out(one, two_runs, query):
    rows = load_run(two_runs[0]).rollouts.to_pylist()
    index = Index(two_runs[0] / "rollouts")
    index.refresh()
    asked = Query.model_validate(dict(pair.split("=") for pair in query.split("&") if pair))
    found = index.select(asked)
    page = one.page("?" + query)
    groups = page.split("<details>")[1:]
    first = dict.fromkeys(zip(found["step"].to_pylist(), found["group"].to_pylist(), strict=True))
    assert len(groups) == len(first)
    for line, (step, group) in zip(groups, first, strict=True):
        members = [row for row in rows if (row["step"], row["group"]) == (step, group)]
        summary, inside = line.split("</summary>")
        assert f"step {step} · prompt {members[0]['prompt_index']}" in summary
        assert summary.count(html.escape(members[0]["prompt"])) == 1
        chips = re.findall(r'class="chip(| [^"]*)"[^>]*>([^<]*)<', summary)
        assert [float(text) for _, text in chips] == pytest.approx([row["reward"] for row in members], abs=1e-3)
        assert inside.count('class="line one"') == len(members)
        pairs = list(zip(found["step"].to_pylist(), found["group"].to_pylist(), strict=True))
        assert sum("other" not in style for style, _ in chips) == pairs.count((step, group))
        spread = float(np.std([row["reward"] for row in members]))
        assert ("all equal" in summary) == (spread == 0)
        assert spread == 0 or f"± {spread:.2g}<" in summary


def test_a_large_group_shows_those_that_match_first_and_says_how_many_more_there_are(one, two_runs, monkeypatch):
    monkeypatch.setattr(runs, "MOST", 3)
    rows = [r for r in load_run(two_runs[0]).rollouts.to_pylist() if (r["step"], r["group"]) == (3, 1)]
    for query, matches in (
        ("step_from=3&step_to=3&group=1", lambda r: True),
        ("group=1&step_from=3&step_to=3&words=42", lambda r: "42" in r["text"]),
    ):
        page, found = one.page("?" + query), [r["sample"] for r in rows if matches(r)]
        chosen = sorted([*found, *(r["sample"] for r in rows if not matches(r))][:3])
        assert [int(n) for n in re.findall(r">sample (\d+)<", page)] == chosen
        assert page.count("and 1 more") == 2
        assert count(page) == len(found) > 0
    assert one.page("completion?at=0:rollouts:step-000003:5").count(">sample ") == SAMPLES


def test_the_widest_spread_comes_first(two_runs):
    index = Index(two_runs[0] / "rollouts")
    index.refresh()
    spread = index.select(Query(sort="spread"))["spread"].to_numpy()
    assert (np.diff(spread) <= 0).all()
    assert spread[0] > spread[-1]


@pytest.mark.parametrize("query", ["", "correct=no&sort=worst", "step_from=2&step_to=3"])
def test_next_and_previous_walk_through_what_was_found(one, query):
    page, seen = one.page("?" + query), []
    listed = [a for line in page.split('class="line one" ')[1:] for a in addresses(line)[:1]]
    at = re.search(r'<li>\s*<a class="line one" id="[^"]+" href="([^"]+)"', page)[1]
    steps = 0
    while at is not None and steps < 100:
        page, steps = one.page(html.unescape(at)), steps + 1
        seen += re.findall(r'aria-current="true">\s*<a class="line one" href="completion\?at=([^&"]+)', page)
        following = re.search(r'rel="next" href="([^"]+)"', page)
        at = following and following[1]
    assert len(seen) == len(set(seen)) == count(one.page("?" + query))
    assert seen == [address for address in listed if address in set(seen)]
    back = html.unescape(re.search(r'rel="up" href="([^"]+)"', page)[1])
    assert count(one.page(back.removeprefix("./").partition("#")[0])) == len(seen)


@pytest.mark.parametrize("by", COLOURINGS)
def test_a_completion_is_drawn_token_by_token(one, two_runs, by):
    page = one.page(f"completion?at=0:rollouts:step-000002:5&by={by}")
    row = load_run(two_runs[0]).rollouts.filter(load_run(two_runs[0]).rollouts["step"].to_numpy() == 2).to_pylist()[5]
    drawn = re.search(r'<div class="tokens">(.*?)</div>', page, re.DOTALL)[1]
    tokens = [html.unescape(t) for t in re.findall(r"<span[^>]*>(.*?)</span>", drawn, re.DOTALL)]
    assert tokens == [piece or "⟨0⟩" for piece in row["pieces"]]


def test_colours_are_as_strong_as_the_value_and_show_its_sign():
    row = {
        "tokens": [1, 2, 3, 4, 5], "pieces": ["a", "b", "c", "d", "e"], "sampled": [True, True, True, True, False],
        "advantage": 1.0, "credit": [2.0, -1.0, 0.0, 0.01, 9.0], "logprobs": [-1.0] * 5, "entropy": None,
        "planning": [True, False, False, False, False],
        "learner_logprobs": None,
    }  # fmt: skip
    [drawing] = draw([row], "credit", 2.0)
    assert [t.style for t in drawing.tokens] == ["up8", "down4", "", "", "reply"]
    assert drawing.strongest == 2
    assert [t.style for t in draw([row], "credit", 4.0)[0].tokens] == ["up4", "down2", "", "", "reply"]
    assert [t.style for t in draw([row], "planning", 2.0)[0].tokens] == ["much8", "", "", "", "reply"]
    assert not draw([row], "entropy", 2.0)[0].known
    assert "credit -1" in drawing.tokens[1].title


@pytest.mark.parametrize(
    ("by", "values", "styles"),
    [
        ("entropy", [0.0955, 3.0, 11.0, 0.75, np.nan], ["", "much8", "much8", "much2", ""]),
        ("surprisal", [0.0955, 6.0, np.inf, 1.5, 0.0], ["", "much8", "much8", "much2", ""]),
        ("ratio", [0.01, -0.5, np.inf, 0.125, -np.inf], ["", "down8", "up8", "up2", "down8"]),
        ("credit", [0.05, 99.0, -2.0, -0.5, 0.0], ["", "up8", "down8", "down2", ""]),
    ],
)
def test_a_colour_means_the_same_in_every_completion(by, values, styles):
    row = dict.fromkeys(("sampled", "advantage", "planning", "entropy", "credit", "learner_logprobs"))
    row |= {"tokens": [1] * 5, "pieces": ["a"] * 5, "logprobs": [0.0] * 5}
    name = {"surprisal": "logprobs", "ratio": "learner_logprobs"}.get(by, by)
    row[name] = [-v if by == "surprisal" else v for v in values]
    for others in ([], [row | {"pieces": ["b"] * 5}]):
        assert [t.style for t in draw([row, *others], by, 2.0)[0].tokens] == styles
    alone = {name: value and value[:1] for name, value in row.items()}
    assert draw([alone], by, 2.0)[0].tokens[0].style == styles[0]


def test_a_completion_leads_to_its_group_and_two_stand_side_by_side(one):
    page = one.page("completion?at=0:rollouts:step-000002:5")
    group = addresses(page[page.index("Its group") :])
    assert group == [f"0:rollouts:step-000002:{i}" for i in range(4, 8)]
    beside = re.findall(r'href="(pair\?[^"]+)"', page)
    assert len(beside) == 3
    assert one.page(html.unescape(beside[0])).count('<div class="tokens">') == 2


def test_two_runs_are_compared_on_the_same_prompts(both, two_runs):
    page = both.page("prompts?run=0&other=1")
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", line, re.DOTALL) for line in page.split("<tr>")[2:]]
    tables = [load_run(run).rollouts.to_pylist() for run in two_runs]
    assert len(rows) == PROMPTS
    for cells in rows:
        prompt = int(re.search(r"index=(\d+)", cells[0])[1])
        means = [np.mean([r["reward"] for r in t if r["prompt_index"] == prompt]) for t in tables]
        assert [float(c.split()[0]) for c in cells[2:4]] == pytest.approx(means, abs=1e-3)
        assert float(cells[4]) == pytest.approx(means[1] - means[0], abs=2e-3)
    pair = both.page("prompt?index=1&run=0&other=1")
    assert pair.count('<div class="tokens">') == 2
    assert "first" in pair
    assert "second" in pair


def test_markup_in_a_completion_stays_text(one, two_runs):
    hostile = [r for r in load_run(two_runs[0]).rollouts.to_pylist() if SCRIPT in r["text"] and IMAGE in r["text"]]
    assert hostile
    pages = [one.page(p) for p in ("", "?page=2", "?words=%3Cscript%3E", "prompts", "report")]
    pages += [one.page(f"completion?at={a}") for a in addresses(pages[0])[:20]]
    assert any(SCRIPT in "".join(Elements(p).text) for p in pages)
    for page in pages:
        found = Elements(page)
        assert not {"script", "img", "object", "embed", "b onerror"} & set(found.tags)
        assert found.sources == (["keys.html"] if "iframe" in found.tags else [])
        assert not [name for name in found.attributes if name.startswith("on")]
        assert "49" not in re.findall(r" (\d+)</span>", page)  # a template in a completion is not one


def test_a_page_loads_nothing_from_another_machine_and_runs_no_script(one):
    for path in ("", "completion?at=0:rollouts:step-000000:0", "prompts", "report"):
        page, headers = one.get(path)
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'")
        assert "script" not in policy
        assert headers["Referrer-Policy"] == "no-referrer"
        assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", page)


def test_a_page_brings_its_own_style(one):
    page, _ = one.get("")
    [address] = re.findall(r'<link rel="?stylesheet"? href="?([^" >]+)', page)
    style, headers = one.get(address.rpartition("/")[2])
    assert headers["Content-Type"].startswith("text/css")
    assert re.search(r"body\s*\{", style)


def test_without_the_token_and_from_another_host_there_is_nothing(one):
    for token in ("", "wrong", TOKEN + "x"):
        assert one.refused(token=token)[0] == 404
    assert one.refused(Host="evil.example")[0] == 400


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("?step_from=two", "step_from is two"),
        ("?sort=shiny", "sort is shiny"),
        ("?run=7", "there is no run 7"),
        ("?colour=red", "there is no setting 'colour'"),
        ("completion?at=0:rollouts:step-000000:999", "there is no completion 999"),
        ("completion?at=0:rollouts:../../config:0", "there is no completion 0 in '../../config'"),
        ("completion?at=0:../..:x:0", "there are no '../..'"),
        *((f"?{name}={number}", f"{name} is {number[:20]}") for name in LARGE for number in NUMBERS),
        *((f"prompts?{name}={number}", f"{name} is {number[:20]}") for name in ("run", "page") for number in NUMBERS),
        *((f"prompt?index={number}", f"index is {number[:20]}") for number in NUMBERS),
        ("?reward_from=nan", "reward_from is nan"),
        ("?reward_to=1e999", "reward_to is 1e999"),
        ("?words=" + "a" * 1001, "words is aaa"),
        ("prompts?run=7", "there is no run 7"),
        ("prompts?other=7", "there is no run 7"),
        ("report?run=7", "there is no run 7"),
        ("runs?order=up", "order is up"),
        ("pair", "'' is not the address of a completion"),
        ("pair?a=0:rollouts:step-000000:0&b=0:rollouts:step-000000:" + "9" * 30, "is not the address of a completion"),
        ("completion?at=" + "9" * 5000 + ":rollouts:x:0", "is not the address of a completion"),
        ("completion?at=0:rollouts:step-000000:%D9%A3", "is not the address of a completion"),
        ("completion?at=9:rollouts:step-000000:0", "there is no run 9"),
        ("completion?at=<b>", "'<b>' is not the address of a completion"),
        ("completion?at=0:rollouts:step-000000:0&by=mood", "by is mood"),
        ("prompt?index=-1", "index is -1"),
    ],
)
def test_an_invalid_request_is_refused_in_a_sentence(one, path, sentence):
    code, page = one.refused(path)
    assert code == 400
    assert sentence in page


def test_a_running_run_is_shown_as_it_is_now(tmp_path):
    folder = make_run(tmp_path / "going", steps=2, over=False)
    with Served(make_app([folder], TOKEN)) as served:
        page = served.page()
        assert "(running)" in page
        assert count(page) == 2 * PROMPTS * SAMPLES
        assert 'http-equiv="refresh"' in served.page("?live=1")
        add_step(folder, Recorder(folder, spell), np.random.default_rng(5), 2)
        assert count(served.page()) == 3 * PROMPTS * SAMPLES
        (folder / "rollouts" / "step-000002.parquet").unlink()  # cut back, as a resumed run is
        assert count(served.page()) == 2 * PROMPTS * SAMPLES


def test_a_run_without_completions_is_shown_as_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 0, "reward_mean": 0.5}\n')
    with Served(make_app([tmp_path], TOKEN)) as served:
        assert count(served.page()) == 0
        assert count(served.page("?words=seven&kind=evals")) == 0
        assert "Nothing here yet" in served.page()
        assert "No prompt with a number has been drawn yet" in served.page("prompts")
        assert count(served.page("prompt?index=3")) == 0


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        make_app([tmp_path], TOKEN)


@pytest.mark.usefixtures("interruptible")
def test_the_command_prints_an_address_that_works_until_it_is_stopped(two_runs):
    command = [sys.executable, "-m", "textpolicy", "view", *map(str, two_runs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as viewer:
        address = viewer.stdout.readline().split()[0]
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{20,}/", address)
        with urllib.request.urlopen(address) as answer:
            assert "2 runs" in answer.read().decode()
        viewer.send_signal(signal.SIGINT)
        assert viewer.wait(10) == 130
        assert viewer.stderr.read() == "textpolicy: stopped by Ctrl-C\n"


def test_a_port_in_use_and_a_folder_that_is_not_a_run_are_refused_in_a_sentence(two_runs, tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["view", str(two_runs[0]), f"--port={port}"]) == 2
    assert f"port {port} cannot be used (Address already in use); choose another" in capsys.readouterr().err
    assert main(["view", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_a_run_whose_examples_have_no_question_ends_with_a_prompt_to_try(tmp_path):
    ended = train_run(tmp_path / "run")
    output = (ended / "log.txt").read_text()
    assert shlex.join(["textpolicy", "generate", "--run", str(ended), "1 2"]) in " ".join(output.split())
