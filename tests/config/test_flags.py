"""The command line as settings: every word arrives as it was typed, and every mistake names what was meant."""

import datetime
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from textpolicy.cli.main import main
from textpolicy.config.flags import checked, parse, read
from textpolicy.config.settings import Config, Section
from textpolicy.errors import UserError
from textpolicy.report.page import ReportArguments
from textpolicy.run.export import ExportArguments
from textpolicy.run.inference import EvalArguments, GenerateArguments
from textpolicy.run.resume import TrainArguments

# what a shell, a person or a program may call a folder
NAMES = [
    "123", "-5", "-.5", "007", "1e-4", "lr=1e-4,seed=0", "a,b", ",", "[x]", "[1, 2]", "{a: b}", '{"a": 1}', '"q"',
    "'s'", '"', " lead", "trail ", "two words", "None", "null", "none", "true", "False", "nan", "inf", "a=b", "=",
    "a\nb", "\t", "~", "é", "日本", "*", "$(x)", "\\", "#1", "@file", "%s", "http://h/?a=b", "-",
    "- a dash and a blank",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_arrives_as_it_was_typed(name):
    path = Path.home() if name == "~" else Path(name)
    assert parse(ReportArguments, [name, "b", name], "report").runs == [path, Path("b"), path]
    assert parse(ReportArguments, ["--out", name, "--", name], "report").out == path
    assert parse(GenerateArguments, [f"--model={name}", name], "generate").model == name
    assert parse(GenerateArguments, [name, f"--run={name}"], "generate").run == path
    assert parse(TrainArguments, [f"--tracking.name={name}", "--task", name], "train").config.tracking.name == name
    assert parse(ExportArguments, ["--to=peft", name, "--base", name], "export").base == name


@pytest.mark.parametrize("name", ["-x", "--out", "--", "-h", "--help"])
def test_after_two_dashes_a_word_is_no_flag(name):
    assert parse(ReportArguments, ["--out=o", "--", name], "report").runs == [Path(name)]


class Every(Section):
    """Try every kind of setting."""

    words: Annotated[tuple[str, ...], Field(max_length=9)] = ("a",)
    whole: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    bits: Literal[2, 4] | None = 4
    level: Literal["none", "all"] | None = None
    ratio: float | None = 0.5
    note: str | None = None
    folder: Path | None = None
    day: datetime.date | None = None
    on: bool = True
    off: bool | None = None
    table: dict[str, object] = {}  # noqa: RUF012 - a field of pydantic


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--words="], {"words": ()}),
        (["--words", ""], {"words": ()}),
        (["--words=[]"], {"words": ()}),
        (["--words", "b,c"], {"words": ("b", "c")}),
        (["--words=b, c", "--words", "d"], {"words": ("b", "c", "d")}),
        (["--words", "b", "c", "--on"], {"words": ("b", "c"), "on": True}),
        (['--words=["b,c", "[d]"]'], {"words": ("b,c", "[d]")}),
        (["--words=[b"], {"words": ("[b",)}),
        (["--words=None"], {"words": ("None",)}),
        (["--whole=0,1", "2"], {"whole": (0, 1, 2)}),
        (["--whole=[3, 4]"], {"whole": (3, 4)}),
        (["--bits", "2"], {"bits": 2}),
        (["--bits=None", "--ratio", "None"], {"bits": None, "ratio": None}),
        (["--level", "none"], {"level": "none"}),
        (["--note", "None", "--folder=None"], {"note": "None", "folder": Path("None")}),
        (["--note="], {"note": ""}),
        (["--ratio", "-1"], {"ratio": -1.0}),
        (["--ratio=1", "--ratio=2"], {"ratio": 2.0}),
        (["--day=2026-02-03"], {"day": datetime.date(2026, 2, 3)}),
        (["--no-on", "--off"], {"on": False, "off": True}),
        (["--on=false", "--no-off"], {"on": False, "off": False}),
        (["--on", "--no-on", "--on"], {"on": True}),
        (["--table=a=1,b=true", "--table=c=x=y"], {"table": {"a": 1, "b": True, "c": "x=y"}}),
        (['--table={"a": "1", "b": {"c": "true"}, "d": null}'], {"table": {"a": "1", "b": {"c": "true"}, "d": None}}),
    ],
)
def test_a_value_is_what_was_written(words, expected):
    given = parse(Every, words, "try")
    assert given.model_dump(exclude_unset=True) == expected


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--words"], "--words needs a value; write --words=VALUE"),
        (["--ratio", "--on"], "--ratio needs a value; write --ratio=VALUE"),
        (["--ratio="], "ratio is ; input should be a valid number"),
        (["--ratio=nan"], "ratio is nan; input should be a finite number"),
        (["--ratio", "-inf"], "ratio is -inf; input should be a finite number"),
        (["--bits=3"], "bits is 3; input should be 2 or 4"),
        (["--whole=1,-2"], "whole.1 is -2; input should be greater than or equal to 0"),
        (["--on=perhaps"], "on is perhaps; input should be a valid boolean"),
        (["--no-ratio"], "there is no flag --no-ratio; did you mean --ratio?"),
        (["--no-on=1"], "there is no flag --no-on=1; ask for --help"),
        (["--table=a"], "--table cannot be read; write NAME=VALUE,NAME=VALUE or a JSON object"),
        (["--table={" + '"a":[' * 50_000], "--table cannot be read"),
        (["--table=a=" + "9" * 5000], "--table cannot be read"),
        (["--table={"], "--table cannot be read; write NAME=VALUE,NAME=VALUE or a JSON object"),
        (["--note=a\0b"], "note has a zero byte"),
        (["--note=\udce9t\udce9"], "note has text that is not UTF-8; write it in UTF-8"),
        (["--words=a,b\udcff"], "words has text that is not UTF-8"),
        (['--table={"a": [{"b": "\\ud83d"}]}'], "table has text that is not UTF-8"),
        (["extra"], "the command does not take 'extra'"),
        (["-v"], "there is no flag -v; ask for --help"),
    ],
)
def test_a_value_that_cannot_be_is_one_sentence(words, sentence):
    with pytest.raises(UserError) as error:
        parse(Every, words, "try")
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--lr", "--optimizer.learning-rate?"),
        ("--LR", "ask for --help"),
        ("--learning-rate=1", "--optimizer.learning-rate?"),
        ("--rollout.learning-rate", "--optimizer.learning-rate?"),
        ("--temperature", "--rollout.temperature?"),
        ("--rollout.temprature", "--rollout.temperature?"),
        ("--group-size", "--adapter.group-size or --rollout.group-size?"),
        ("--rollout.max_tokens=8", "--rollout.max-tokens?"),
        ("--threads", "--machine.threads?"),
        ("--correct-from", "--rewards.correct-from?"),
        ("--coefficient", "--algorithm.kl.coefficient?"),
        ("--algorithm", "--algorithm is a section, whose settings have flags of their own, such as --algorithm.name"),
        ("--adapter=lora", "such as --adapter.kind"),
        ("--kl", "such as --algorithm.kl.coefficient"),
        ("--algorithm.sepa", "such as --algorithm.sepa.steps"),
        ("--optimizer", "such as --optimizer.learning-rate"),
        ("--top-k", "training samples from the full distribution"),
        ("--zzzzzzz", "ask for --help"),
        ("--", "needs"),
    ],
)
def test_a_flag_that_is_none_names_the_one_that_was_meant(word, meant):
    with pytest.raises(UserError) as error:
        read(TrainArguments, [word, "3"] if word != "--" else ["--steps", word], "train")
    assert meant in str(error.value)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"learning_rate": 1}, "no setting 'learning_rate'; did you mean 'optimizer.learning_rate'?"),
        ({"lr": 1}, "no setting 'lr'; did you mean 'optimizer.learning_rate'?"),
        ({"rollout": {"learning_rate": 1}}, "no setting 'rollout.learning_rate'; did you mean 'optimizer.learning"),
        ({"group_size": 4}, "did you mean 'adapter.group_size' or 'rollout.group_size'?"),
        ({"kl": 1}, "no setting 'kl'; choose one of model, task"),
        ({"tracking": {"to": "wandb"}}, 'tracking.to is wandb; write a list: ["wandb"]'),
        ({"algorithm": "gspo"}, "algorithm is gspo; it is a section, so set algorithm.name and others"),
        (
            {"algorithm": {"kl": 0.1}},
            "kl is 0.1; it is a section, so set algorithm.kl.coefficient and others",
        ),
    ],
)
def test_a_setting_in_the_wrong_place_names_its_own(values, sentence):
    with pytest.raises(UserError) as error:
        checked(Config, values)
    assert sentence in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "path", ["rewards.correct_from", "algorithm.reward_threshold", "algorithm.top_entropy", "optimizer.final_fraction"]
)
def test_a_limit_is_a_finite_number(path, value):
    section, name = path.split(".")
    with pytest.raises(UserError, match=f"{path} is "):
        checked(Config, {section: {name: value}})


ADDRESSES = [
    "http://h/?api_key=planted", "https://h:8000/v1?token=planted", "http://planted@h", "https://h/#access_token=planted",
    "HTTP://me:planted@h", "h:8000/?API-KEY=planted", "me:planted@h:8000", "postgresql://me@h/x?password=planted",
    "mysql+pymysql://me:planted@h/x", "http://h/?x=planted", "http://h/x;secret=planted", "http://h/%3Fapi_key%3Dplanted",
    "https://h/?a=1&sig=planted", "databricks://h?auth=planted",
]  # fmt: skip
FREE = [
    "http://h:8000", "https://h.example/v1/", "http://[::1]:8000", "sqlite:///runs.db?timeout=5", "file:///tmp/mlruns",
    "./mlruns", "databricks://profile", "databricks", "postgresql://me@h/x", "localhost:5000", "https://h/keys/a", "",
]  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_secret_in_an_address_is_refused_and_not_repeated(address):
    for values in ({"engine": "tinker", "tinker": {"base_url": address}}, {"tracking": {"uri": address}}):
        with pytest.raises(UserError, match="would be written to the run's folder") as error:
            checked(Config, values)
        assert "planted" not in str(error.value)


@pytest.mark.parametrize("address", FREE)
def test_an_address_without_a_secret_is_kept(address):
    assert checked(Config, {"tracking": {"uri": address}}).tracking.uri == address


def test_the_help_fits_the_terminal_and_names_every_setting(capsys, monkeypatch):
    for columns in (40, 80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        for words in (["train", "--help"], ["eval", "-h"], ["report", "a", "--help"], ["campaign", "run", "--help"]):
            with pytest.raises(SystemExit) as stop:
                main(words)
            assert stop.value.code == 0
            text = capsys.readouterr().out
            words_alone = [line for line in text.splitlines() if len(line) > columns]
            assert all(len(line.split()) <= 2 for line in words_alone)  # a word that is longer than the terminal
            assert "tuple[" not in text
            assert "None" not in text


def test_the_parts_of_a_campaign_have_helps_of_their_own(capsys):
    seen = set()
    for name in ("plan", "run", "status", "analyze", "report"):
        with pytest.raises(SystemExit):
            main(["campaign", name, "--help"])
        seen.add(capsys.readouterr().out.splitlines()[2])
    assert len(seen) == 5


def test_flags_stand_before_and_after_the_config_file(tmp_path, capsys):
    (tmp_path / "c.toml").write_text('[tracking]\nto = ["tensorboard"]\n[rollout]\ngroup_size = 4\n')
    for words in (["--seed=1", str(tmp_path / "c.toml")], [str(tmp_path / "c.toml"), "--seed", "1"]):
        assert main(["train", *words, "--model=./none", "--tracking.to="]) == 2
        assert "'./none'" in capsys.readouterr().err


def test_a_list_takes_several_words_where_no_argument_stands_alone():
    assert parse(EvalArguments, ["--pass-at=1", "--pass-at", "4", "8"], "eval").pass_at == [1, 4, 8]
    args = parse(TrainArguments, ["--allow", "steps", "c.toml"], "train")
    assert (args.allow, args.config_file) == (("steps",), Path("c.toml"))
