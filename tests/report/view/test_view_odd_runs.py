"""Runs that are not as a run writes them: each page shows them or says in a sentence why not; markup stays text."""

import json
import shutil
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_run import make_run

pytest.importorskip("starlette", reason="the viewer is textpolicy[view]")
from starlette.testclient import TestClient

from textpolicy.record.layout import schema
from textpolicy.report.view.server import make_app

MARKUP = (
    "\"><script>document.title='run'</script><img src=x onerror=alert(1)>'</pre></title><svg/onload=alert(2)>{{7*7}}"
)
AT = "0:rollouts:step-000002:"
PAGES = [
    "", "?kind=evals", "?sort=spread", "?sort=best&correct=no", "?reward_from=0", "?words=check", "prompts",
    "prompts?sort=changed", "runs", "prompt?index=1", "completion?at=0:evals:validation-000000:1&by=entropy",
    *(f"completion?at={AT}3&by={by}" for by in ("credit", "surprisal", "ratio", "planning")), f"pair?a={AT}3&b={AT}4",
]  # fmt: skip

SOME = ["", "?sort=spread&correct=no", "prompts", f"completion?at={AT}3&by=credit"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "made")


def changed(folder, like, name, value):
    """Make a copy in which ``value(old)`` stands in every other place of a column of the completions."""
    shutil.copytree(like, folder)
    for path in [*(folder / "rollouts").iterdir(), *(folder / "evals").iterdir()]:
        table = pq.read_table(path)
        values = [value(old) if i % 2 else old for i, old in enumerate(table[name].to_pylist())]
        column = pa.array(values, schema().field(name).type)
        pq.write_table(table.set_column(table.schema.get_field_index(name), name, column), path)
    return folder


def looked_at(folder, pages=PAGES):
    """Return the pages, of which none may be an error of the server."""
    client = TestClient(make_app([folder], "t"), base_url="http://127.0.0.1")
    answers = [client.get(f"/t/{page}") for page in pages]
    assert {answer.status_code for answer in answers} <= {200, 400}
    return [answer.text for answer in answers]


def each(name, *values):
    return [(name, repr(value)[:20], lambda old, value=value: value) for value in values]


def every(name, value):
    return (name, f"[{value}]", lambda old: old and [value] * len(old))


ODD = [
    *(change for name in schema().names for change in each(name, None)),
    *(change for name in ("reward", "advantage") for change in each(name, float("nan"), float("inf"), -1e308, 1e-320)),
    *(change for name in ("step", "group", "prompt_index", "sample") for change in each(name, -1, 2**31 - 1)),
    *(change for name in ("prompt", "text", "split") for change in each(name, "", "\0", "a" * 10_000)),
    *(every(name, value) for name in ("logprobs", "entropy", "credit") for value in (float("nan"), float("-inf"))),
    *(
        (name, "shorter", lambda old: old and old[:-1])
        for name in ("tokens", "pieces", "logprobs", "credit", "sampled")
    ),
]


@pytest.mark.parametrize(("name", "what", "value"), ODD, ids=[f"{name} {what}" for name, what, _ in ODD])
def test_odd_completions_are_shown_or_refused_in_a_sentence(tmp_path, made, name, what, value):
    looked_at(changed(tmp_path / "run", made, name, value), SOME)


class Tags(HTMLParser):
    """The tags of a page, with the attributes that run something."""

    def __init__(self, page):
        super().__init__()
        self.found = set()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found |= {tag, *(name for name, _ in attributes if name.startswith("on"))}


def test_markup_stays_text_wherever_it_stands(tmp_path, made):
    folder = tmp_path / MARKUP.replace("/", "\u2044")
    for name in ("prompt", "text", "split", "finish_reason"):
        shutil.rmtree(folder, ignore_errors=True)
        changed(folder, made, name, lambda old: MARKUP)
        settings = {MARKUP: MARKUP, "model": MARKUP, "algorithm": {"name": MARKUP}, "task": [MARKUP]}
        (folder / "config.json").write_text(json.dumps(settings))
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"kind": "eval", "step": 9, "split": MARKUP, "accuracy": 0.5, "problems": 2}) + "\n")
            file.write(json.dumps({"kind": "train", "step": 9, MARKUP: 1.0}) + "\n")
        for path in (folder / "rollouts").glob("step-000001*"):
            path.rename(path.with_name(MARKUP.replace("/", "\u2044") + ".parquet"))
        asked = [f"?words={MARKUP}", f"completion?at={MARKUP}", f"runs?sort={MARKUP}", f"?{MARKUP}={MARKUP}"]
        for page in looked_at(folder, [*PAGES, *asked]):
            tags = Tags(page).found
            assert not tags & {"script", "img", "object", "embed", "onerror", "onload"}
            assert "49'" not in page
