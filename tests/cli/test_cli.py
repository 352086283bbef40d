"""The command line: exit codes, one sentence per mistake, nothing half-written."""

import re
import subprocess
import sys

import pytest

from textpolicy.cli.main import COMMANDS, main
from textpolicy.config.flags import parse
from textpolicy.run.assembly import with_max_tokens
from textpolicy.run.resume import TrainArguments
from textpolicy.tasks import load_task


def refused(capsys, *argv):
    """What a request that cannot work prints; it must be one line on stderr, with exit code 2."""
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("textpolicy: ")
    assert err.count("\n") == 1
    return err


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("train", "generate", "eval", "export", "validate", "algorithms", "tasks"))


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("textpolicy 0.")


def test_lists_of_algorithms_and_tasks(capsys):
    assert main(["algorithms"]) == main(["tasks"]) == 0
    text = capsys.readouterr().out
    assert "gspo" in text
    assert "addition" in text


def test_every_task_is_listed_and_one_can_be_shown(capsys):
    assert main(["tasks"]) == 0
    listed = capsys.readouterr().out
    rows = listed.split("\n\n")[0].splitlines()
    assert all(row.endswith((".", "default.")) for row in rows)
    assert len({row.index(re.split(r" {2,}", row)[1]) for row in rows}) == 1, "what a task is stands in one column"
    assert main(["tasks", "countdown", "--show", "3"]) == 0
    shown = capsys.readouterr().out
    assert "1000 training, 100 validation, 200 test problems" in shown
    assert shown.count("user: Make") == shown.count("-- problem") == 3
    assert main(["tasks", "countdown_tool"]) == 0
    assert "tools: calculate" in capsys.readouterr().out


def test_a_command_in_a_folder_that_is_gone_is_one_sentence(capsys, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for words in (["train", "--steps", "1"], ["doctor", "x"], ["tasks"]):
        assert main(words) == 2
        assert "the folder that this is run in is gone" in capsys.readouterr().err


def test_an_unknown_command_is_refused(capsys):
    assert "'trian'" in refused(capsys, "trian")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["train", "missing.toml"], "cannot read the config missing.toml"),
        (["train", "."], "cannot read the config . (Is a directory); check the path"),
        (["train", "examples/train.toml"], "check the path; examples/ comes with a checkout of the repository"),
        (["train", "--task", "examples/16_own_task.py"], "examples/ comes with a checkout of the repository"),
        (["train", "--task", "largets"], "did you mean 'largest'?"),
        (["train", "--model", "smollm2-135"], "did you mean 'smollm2-135m'?"),
        (["train", "--model", "./nothing.gguf"], "nothing.gguf"),
        (["train", "--rollout.group-size", "1"], "group_size is 1"),
        (["train", "--rollout.max-tokens", "0"], "max_tokens is 0"),
        (["generate", "hello"], "pass --run RUN, --model NAME"),
        (["generate", "--run", "nowhere", "hello"], "nowhere is not a run folder"),
        (["generate", "--model", "smollm2-135m", "--max-tokens", "0", "hello"], "max_tokens is 0"),
        (["generate", "--model", "smollm2-135m", "--temperature", "-1", "hello"], "temperature is -1"),
        (["generate", "--model", "smollm2-135m", "  "], "the prompt is empty"),
        (["eval", "--model", "smollm2-135m"], "no task to measure"),
        (["eval", "--model", "smollm2-135m", "--task", "largest", "--max-tokens", "0"], "max_tokens is 0"),
        (["eval", "--model", "smollm2-135m", "--task", "largest", "--temperature", "-1"], "temperature is -1"),
        (["tasks", "countdwn"], "did you mean 'countdown'?"),
        (["eval", "--model", "smollm2-135m", "--task", "largest", "--samples", "2"], "2 samples at temperature 0"),
        (["eval", "--model", "smollm2-135m", "--task", "largest", "--pass-at", "4"], "pass_at is 4 and samples 1"),
        (["generate", "--model", "smollm2-135m", "--top-p", "0", "hello"], "top_p is 0"),
        (["generate", "--model", "smollm2-135m", "--repetition-penalty", "0", "hello"], "repetition_penalty is 0"),
        (["generate", "--run", "a", "--model", "b", "hello"], "give either --run RUN or --model NAME, not both"),
        (["generate", "--run", "a", "--adapter", "b", "hello"], "--adapter b is given with a run"),
        (["eval", "--model", "smollm2-135m", "--task", "largets"], "did you mean 'largest'?"),
    ],
)
def test_impossible_arguments_are_one_sentence_and_exit_code_2_before_a_model_is_loaded(
    capsys, tmp_path, monkeypatch, argv, sentence
):
    monkeypatch.chdir(tmp_path)
    if argv[0] != "train":  # which finds out from the loader that there is no such model
        monkeypatch.setattr("textpolicy.mlx.models.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert sentence in refused(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_exists_is_left_alone(capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "keep").write_text("mine")
    assert "exists; choose another" in refused(capsys, "train", "--output", str(tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["keep"]


def test_an_unknown_flag_names_the_near_one(capsys):
    assert "did you mean --steps?" in refused(capsys, "train", "--stepz", "3")


def test_a_flag_overrides_the_file(tmp_path, capsys):
    (tmp_path / "run.toml").write_text('task = "additoin"\n[rollout]\ngroup_size = 4\n')
    assert "group_size is 1;" in refused(capsys, "train", str(tmp_path / "run.toml"), "--rollout.group-size", "1")
    (tmp_path / "run.toml").write_text("[rollout]\ngroup_size = 1\n")
    assert "run.toml: rollout.group_size is 1;" in refused(capsys, "train", str(tmp_path / "run.toml"))


def test_train_help_shows_every_leaf_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--optimizer.learning-rate" in text
    assert "Peak learning rate" in text
    assert "0.0003" in text


def test_the_module_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "textpolicy", "nonsense"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there is no command 'nonsense'; run 'textpolicy --help' for the list" in done.stderr


def test_an_unknown_command_names_the_near_one(capsys):
    assert "there is no command 'trian'; did you mean 'train'? run" in refused(capsys, "trian")


@pytest.mark.parametrize("flag", ["--rollout.top-p=0.9", "--rollout.repetition-penalty=1.2", "--rollout.min-p=0.1"])
def test_sampling_that_training_refuses_has_no_flag_and_the_error_explains_why(capsys, flag):
    assert f"{flag}; training samples from the full distribution" in refused(capsys, "train", flag)


def test_a_section_is_not_suggested_for_a_misspelt_flag(capsys):
    assert "; did you mean --rollout.max-turns?" in refused(capsys, "train", "--rollout.max-turn=3")


def test_a_package_that_is_missing_is_named_with_the_install_line(capsys, monkeypatch):
    def lacks(arguments):
        raise ModuleNotFoundError("No module named 'gguf'", name="gguf")

    monkeypatch.setitem(COMMANDS, "tasks", (lacks, ""))
    assert "the package 'gguf' is not installed; install it with: pip install" in refused(capsys, "tasks")


def test_a_module_of_our_own_that_is_missing_is_a_bug_and_stays_one(monkeypatch):
    def lacks(arguments):
        raise ModuleNotFoundError("No module named 'textpolicy.nonsense'", name="textpolicy.nonsense")

    monkeypatch.setitem(COMMANDS, "tasks", (lacks, ""))
    with pytest.raises(ModuleNotFoundError):
        main(["tasks"])


def test_ctrl_c_exits_with_130(capsys, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "tasks", (interrupted, ""))
    assert main(["tasks"]) == 130
    assert capsys.readouterr().err == "textpolicy: stopped by Ctrl-C\n"


def test_one_flag_of_a_section_leaves_the_others_to_the_task():
    flags = ["--rollout.group-size=6", "--algorithm.kl.coefficient=0.1", "--quiet"]
    args = parse(TrainArguments, flags, "train", steps=3, rollout={"temperature": 0.5}, task="countdown")
    assert args.model_fields_set == {"steps", "rollout", "task", "algorithm", "quiet"}
    assert args.config.rollout.model_fields_set == {"group_size", "temperature"}
    assert args.config.algorithm.kl.model_fields_set == {"coefficient"}
    assert args.config.algorithm.model_fields_set == {"kl"}
    assert with_max_tokens(args.config, load_task("countdown")).rollout.max_tokens == 64


def test_a_flag_that_gives_the_default_is_given():
    args = parse(TrainArguments, ["--rollout.max-tokens=8", "--task=countdown"], "train")
    assert with_max_tokens(args.config, load_task("countdown")).rollout.max_tokens == 8
