"""Whether runs learned: intervals against a simulated truth, and the words for every case."""

import json

import numpy as np
import pytest

from textpolicy.record.reader import load_run
from textpolicy.report.learning import learning


def made(folder, looks, over=True, rewards=()):
    """A run with these (step, split, accuracy, problems, solved) evaluations and mean rewards by step."""
    folder.mkdir(parents=True)
    rows = [{"kind": "train", "step": step, "reward_mean": reward} for step, reward in enumerate(rewards)]
    for step, split, accuracy, problems, solved in looks:
        row = {"kind": "eval", "step": step, "split": split, "accuracy": accuracy, "problems": problems}
        rows.append({**row, "solved": solved} if solved else row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if over:
        (folder / "summary.json").write_text("{}")
    return load_run(folder)


def marked(folder, before, after, recorded=True):
    """A run whose marks on test problems are these arrays of 0 and 1."""
    marks = ["".join(map(str, map(int, x))) if recorded else "" for x in (before, after)]
    pairs = zip((0, 9), (before, after), marks, strict=True)
    return made(folder, [(step, "test", float(np.mean(x)), len(x), solved) for step, x, solved in pairs])


@pytest.mark.parametrize(
    ("before", "after", "answer", "said"),
    [
        ([0] * 50, [1] * 40 + [0] * 10, "Yes", "rose from 0.0% to 80.0%, by 80.0 points"),
        ([1] * 40 + [0] * 10, [0] * 50, "No, it got worse", "fell from 80.0% to 0.0%, by 80.0 points"),
        ([1, 0] * 25, [0, 1] * 25, "Not shown", "stayed at 50.0%"),
        ([0] * 50, [0] * 50, "Not shown", "stayed at 0.0%"),
        ([0], [1], "Not shown", "rose from 0.0% to 100.0%"),
        ([0] * 50, [1] + [0] * 49, "Not shown", "The interval includes no change at all."),
    ],
)
def test_one_run_is_judged_over_its_problems(before, after, answer, said, tmp_path):
    found = learning([marked(tmp_path / "a", before, after)])
    assert found.answer == answer
    assert said in found.reason
    assert "95% interval" in found.reason
    assert f"over {len(before)} problem{'s' * (len(before) > 1)}; another seed may end elsewhere" in found.reason


def ends(reason):
    low, high = reason.split("95% interval ")[1].split(",")[0].split(" to ")
    return float(low) / 100, float(high) / 100


@pytest.mark.parametrize(
    ("p", "gain", "loss", "problems"), [(0.1, 0.3, 0.1, 40), (0.5, 0.05, 0.05, 100), (0.0, 0.02, 0.0, 60)]
)
@pytest.mark.parametrize("recorded", [True, False])
def test_the_interval_of_one_run_covers_the_true_change(p, gain, loss, problems, recorded, tmp_path):
    rng = np.random.default_rng(7)
    truth, covered = (1 - p) * gain - p * loss, 0
    for trial in range(200):
        before = rng.random(problems) < p
        after = np.where(before, rng.random(problems) >= loss, rng.random(problems) < gain)
        low, high = ends(learning([marked(tmp_path / str(trial), before, after, recorded)]).reason)
        assert low < high
        covered += low - 1e-3 <= truth <= high + 1e-3
    assert covered / 200 >= 0.92


def test_several_runs_are_judged_over_their_seeds(tmp_path):
    def runs(name, *changes):
        looks = [[(0, "test", 0.2, 1000, ""), (9, "test", 0.2 + c, 1000, "")] for c in changes]
        return [made(tmp_path / f"{name}{i}", some) for i, some in enumerate(looks)]

    found = learning(runs("a", 0.2, 0.25, 0.3))
    assert (found.answer, "over 3 seeds" in found.reason) == ("Yes", True)
    half = 4.302653 * 0.05 / 3**0.5  # t of 2 df, and the SD
    assert ends(found.reason) == pytest.approx((0.25 - half, 0.25 + half), abs=1e-3)
    assert learning(runs("b", 0.5, -0.1)).answer == "Not shown"  # a thousand problems, but two seeds
    assert learning(runs("c", -0.1, -0.11, -0.1)).answer == "No, it got worse"
    alike = learning(runs("d", 0.3, 0.3, 0.3, 0.3))
    assert alike.answer == "Yes, all 4 seeds alike"
    assert "no interval, because all changed by the same amount" in alike.reason
    assert learning(runs("e", 0.0, 0.0)).answer == "No, no seed did"


def test_what_is_not_known_is_said_so(tmp_path):
    once = learning([made(tmp_path / "a", [(0, "test", 0.25, 8, "")], over=False, rewards=[0.1, 0.2, 0.3, 0.9])])
    assert once.answer == "Not known"
    assert "25.0%" in once.reason
    assert "from 0.1 in the first third to 0.9 in the last" in once.reason
    never = learning([made(tmp_path / "b", [])])
    assert never.answer == "Not known"
    assert "No step of training has a reward." in never.reason
    looks = [(0, "test", 0.1, 100, ""), (0, "validation", 0.1, 100, ""), (5, "validation", 0.6, 100, "")]
    going_on = learning([made(tmp_path / "c", looks, over=False)])
    assert going_on.answer == "Yes"
    assert "held-out validation problems solved rose so far from 10.0% to 60.0%" in going_on.reason


def test_what_the_doctor_says_of_the_runs_of_an_arm_is_said_once(tmp_path):
    def run(name, skipped):
        found = made(tmp_path / name, [])
        row = {"kind": "train", "updated": 1, "skipped": skipped, "learning_rate": 1e-3}
        (found.folder / "metrics.jsonl").write_text("".join(json.dumps({**row, "step": s}) + "\n" for s in range(6)))
        return load_run(found.folder)

    [obstacle] = learning([run("a", 1), run("b", 1), run("c", 0)]).obstacles
    assert obstacle.runs == 2
    assert "a loss or gradient was not finite" in obstacle.what
