"""A campaign before its first run: its settings, its errors, and the files of its plan."""

import json
import os
import subprocess
from datetime import date
from pathlib import Path

import pytest

from textpolicy.campaign.plan import jobs_of, planned, write_plan
from textpolicy.campaign.settings import check_campaign, read_campaign
from textpolicy.cli.main import main
from textpolicy.config.flags import parse
from textpolicy.config.settings import Config, check_config, merged, read_values
from textpolicy.errors import UserError

ARMS = {"grpo": {"algorithm": {"name": "grpo"}}, "full": {"algorithm": {"name": "full", "hicra_alpha": 0.3}}}
SETTINGS = {"seeds": [3, 1], "base": {"steps": 5, "optimizer": {"learning_rate": 1e-4}}, "arms": ARMS}
TOML = """
seeds = [3, 1]
[base]
steps = 5
optimizer.learning_rate = 1e-4
[arms.grpo.algorithm]
name = "grpo"
[arms.full.algorithm]
name = "full"
hicra_alpha = 0.3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "duel.toml"
    path.write_text(TOML)
    return path


def campaign(**changes):
    return check_campaign({**SETTINGS, **changes}, "here")


def test_every_arm_has_every_seed_and_a_seed_is_whole_before_the_next(tmp_path):
    jobs = jobs_of(campaign(), tmp_path)
    assert [(job.arm, job.seed) for job in jobs] == [("grpo", 3), ("full", 3), ("grpo", 1), ("full", 1)]
    assert jobs[1].folder == tmp_path / "runs" / "full" / "seed3"


def test_arms_differ_in_their_overrides_alone(tmp_path):
    grpo, full = (campaign().config(arm, 3) for arm in ARMS)
    assert grpo.algorithm.name == "grpo"
    assert full.algorithm.hicra_alpha == 0.3
    same = grpo.algorithm
    assert full.model_copy(update={"algorithm": same}) == grpo
    assert (grpo.seed, grpo.steps, grpo.optimizer.learning_rate) == (3, 5, 1e-4)


HOSTILE = {
    "an empty list": {"tracking": {"to": []}, "adapter": {"modules": []}},
    "words that look like others": {"model": "1e5", "task": "none", "tracking": {"name": "true", "project": "[]"}},
    "signs": {"model": "a, b = [c] {d} \"e\" 'f' \\g #h --i @j ~/k s3:l", "task": "-"},
    "lines": {"tracking": {"name": "one\ntwo\r\n\tthree\x01\x1f\x7f\u2028\ufeff \U0001f600 \u00fc"}},
    "no text": {"tracking": {"name": "", "project": " "}},
    "lists of words": {"adapter": {"modules": ["q_proj", "v,proj", "[1]", "None"]}},
    "numbers": {"optimizer": {"learning_rate": 1e-300, "weight_decay": 0.1 + 0.2}, "rollout": {"temperature": 1}},
    "switches": {"adapter": {"rank_stabilised": True}, "algorithm": {"name": "grpo", "mask_truncated": False}},
    "tables": {"prompt": {"template_args": {"enable_thinking": False, "a b.c": ["x", 1, {"y": "z"}], "": {}}}},
    "dates": {"prompt": {"day": date(2026, 2, 3), "template_args": {"at": "2026-02-03"}}},
    "nothing": {},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_planned_is_what_a_run_reads(name, tmp_path):
    """Also from the manifest, and as `textpolicy train FILE` reads it."""
    settings = campaign(base=HOSTILE[name])
    write_plan(settings, root := tmp_path / "c")
    assert planned(root) == check_campaign(json.loads(settings.model_dump_json()), "here")
    for job in jobs_of(planned(root), root):
        wanted = settings.config(job.arm, job.seed).model_copy(update={"output": job.folder})
        [path] = job.words[2:]
        values = read_values(Path(path))
        assert check_config(values, path) == parse(Config, [], "train", **values) == wanted


@pytest.mark.parametrize("value", [None, 7, [], {}, "", -1.5, True])
@pytest.mark.parametrize("key", ["settings", "created_at", "runs", "seeds"])
def test_a_manifest_with_another_value_ends_in_words_or_works(key, value, tmp_path, capsys):
    write_plan(campaign(), tmp_path / "c")
    path = tmp_path / "c" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert main(["campaign", "status", str(tmp_path / "c")]) == (2 if key == "settings" else 0)
    assert main(["campaign", "plan", str(tmp_path / "c")]) == (2 if key == "settings" else 0)


@pytest.mark.parametrize("name", ["manifest.json", "progress.jsonl"])
@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"null\n", b"[]\n", b'{"arm": 1}\n', b"\xff\xfe\n", b"[" * 5000 + b"\n", b'{"seed": "x"}\n\n', None],
)
def test_damaged_files_of_a_campaign_are_one_sentence(name, damage, tmp_path, capsys):
    write_plan(campaign(), root := tmp_path / "c")
    (root / name).unlink(missing_ok=True)
    (root / name).mkdir() if damage is None else (root / name).write_bytes(damage)
    fine = name == "progress.jsonl" and damage in (b"", b"{")  # as a kill leaves it
    for word in ("status", "analyze", "report", "plan", "run"):
        if word == "run" and fine:
            continue
        code = main(["campaign", word, str(root)])
        said = capsys.readouterr().err
        assert code == (0 if fine and word in ("status", "plan") else 2)
        assert code == 0 or len(said.splitlines()) == 1


@pytest.mark.parametrize("place", ["file/x", "file", "closed/x", "a\0b"])
def test_a_campaign_in_a_folder_that_cannot_be_made_is_one_sentence(place, file, monkeypatch, capsys):
    monkeypatch.chdir(file.parent)
    Path("file").write_text("")
    Path("closed").mkdir(mode=0o500)
    if place == "closed/x" and os.access("closed", os.W_OK):
        monkeypatch.setattr(Path, "mkdir", denied)
    for word in ("plan", "run"):
        assert main(["campaign", word, str(file), f"--output={place}"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def denied(path, *_, **__):
    raise PermissionError(13, "Permission denied", str(path))


@pytest.mark.parametrize("command", ["status", "analyze", "report"])
def test_each_command_describes_itself(command, capsys):
    with pytest.raises(SystemExit):
        main(["campaign", command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert {"status": "Print which runs", "analyze": "print the verdict", "report": "Markdown"}[command] in text


def test_the_plan_is_written_down_before_anything_runs(file, capsys):
    root = file.parent / "out"
    assert main(["campaign", "plan", str(file), "--output", str(root)]) == 0
    printed = capsys.readouterr().out
    assert "2 arms x 2 seeds" in printed
    assert "cannot reach p <= 0.05" in printed
    manifest = json.loads((root / "manifest.json").read_text())
    assert manifest["status"] == "planned"
    assert manifest["seeds"] == [3, 1]
    assert manifest["baseline"] == "grpo"
    assert manifest["versions"]["textpolicy"]
    run = manifest["runs"][1]
    assert (run["arm"], run["seed"], run["finished"], run["returncode"]) == ("full", 3, False, None)
    assert run["overrides"] == {"algorithm": {"name": "full", "hicra_alpha": 0.3}}
    assert run["config"]["optimizer"]["learning_rate"] == 1e-4
    assert run["command"][:2] == ["textpolicy", "train"]
    assert planned(root) == check_campaign({**SETTINGS}, "here")
    assert {p.name for p in root.iterdir()} == {"manifest.json", "run_commands.sh", "configs"}


def test_the_commands_are_a_script_that_a_shell_can_read(file):
    root = file.parent / "out"
    assert main(["campaign", "plan", str(file), "--output", str(root), "--seeds", "0,1,2"]) == 0
    script = root / "run_commands.sh"
    assert os.access(script, os.X_OK)
    assert script.read_text().count("textpolicy train") == 6
    assert subprocess.run(["sh", "-n", str(script)], check=False).returncode == 0


def test_planning_twice_is_the_same_plan_and_another_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    for name in (".DS_Store", "._.DS_Store"):  # of a folder made in Finder
        (tmp_path / "out" / name).write_text("x")
    write_plan(campaign(), tmp_path / "out")
    created = json.loads((tmp_path / "out" / "manifest.json").read_text())["created_at"]
    write_plan(campaign(prices={"hour": 2.0}), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["created_at"] == created
    with pytest.raises(UserError, match="whose alpha differ"):
        write_plan(campaign(alpha=0.1), tmp_path / "out")
    with pytest.raises(UserError, match="seeds can only be added where stopping is 'anytime'"):
        write_plan(campaign(seeds=[3, 1, 7]), tmp_path / "out")


def test_an_anytime_campaign_takes_further_seeds(tmp_path):
    write_plan(campaign(stopping="anytime"), tmp_path / "out")
    write_plan(campaign(stopping="anytime", seeds=[3, 1, 7]), tmp_path / "out")
    assert planned(tmp_path / "out").seeds == (3, 1, 7)
    with pytest.raises(UserError, match="seeds differ"):
        write_plan(campaign(stopping="anytime", seeds=[1, 3, 7]), tmp_path / "out")


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "keep").write_text("mine")
    with pytest.raises(UserError, match="is not a campaign"):
        write_plan(campaign(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["keep"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"grpo": {}}}, "there is 1 arm; give at least two"),
        ({"seeds": []}, "there is no seed"),
        ({"seeds": [1, 2, 1]}, "seed 1 is given twice"),
        ({"baseline": "gpro"}, "did you mean 'grpo'"),
        ({"arms": {**ARMS, "a/b": {}}}, "an arm is called 'a/b'"),
        ({"arms": {**ARMS, "Grpo": {}}}, "the arms grpo and Grpo differ only in the case of their letters"),
        ({"arms": {**ARMS, "other": {"seed": 1}}}, "the arm other sets seed, which all arms share"),
        ({"arms": {**ARMS, "other": {"task": "addition"}}}, "the arm other sets task"),
        ({"arms": {**ARMS, "other": {"evaluation": {"problems": 3}}}}, "the arm other sets evaluation"),
        ({"base": {"output": "x"}}, "[base] sets output"),
        ({"base": {"stepz": 3}}, "did you mean 'steps'"),
        ({"arms": {**ARMS, "other": {"algorithm": {"name": "grpo", "hicra_alpha": 1.0}}}}, "does not use hicra_alpha"),
        ({"alpha": 2}, "alpha is 2"),
        ({"seeds": [1, 2**64]}, "seed is 18446744073709551616"),
        ({"alpha": 0.5, "power": 0.4}, "power is 0.4 and alpha 0.5; set power above alpha"),
        ({"summary": "best"}, "summary is best"),
        ({"pries": {}}, "did you mean 'prices'"),
    ],
)
def test_a_campaign_that_cannot_work_is_refused(changes, message):
    with pytest.raises(UserError) as refused:
        campaign(**changes)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "missing.toml"], "cannot read the config missing.toml"),
        (["pln"], "did you mean 'plan'"),
        (["status", "nowhere"], "nowhere has no manifest.json"),
        (["plan"], "SOURCE is missing; give it"),
    ],
)
def test_commands_that_cannot_work_are_one_sentence_and_exit_code_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["campaign", *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_command_lists_its_parts(capsys):
    assert main(["campaign", "--help"]) == main(["campaign"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("plan", "run", "status", "analyze", "report"))


@pytest.mark.parametrize(("name", "runs"), [("grpo_against_full", 12), ("grpo_against_full_rates", 6)])
def test_the_campaigns_of_the_experiments_can_be_planned(name, runs):
    settings = read_campaign(Path(__file__).parents[2] / "experiments" / f"{name}.toml")
    assert len(settings.arms) * len(settings.seeds) == runs
    assert settings.config(list(settings.arms)[-1], settings.seeds[0]).algorithm.name == "full"


def test_tables_are_laid_over_tables():
    assert merged({"a": {"x": 1, "y": 2}, "b": 1}, {"a": {"y": 3}, "c": 4}) == {"a": {"x": 1, "y": 3}, "b": 1, "c": 4}
