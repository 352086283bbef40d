"""Settings: strict names, ranges, and errors of one sentence that say what to do."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from textpolicy.cli.main import main
from textpolicy.config.settings import Config, check_config, read_config
from textpolicy.errors import UserError
from textpolicy.run.assembly import schedule


def write(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_a_toml_file_mirrors_the_tree(tmp_path):
    config = read_config(
        write(tmp_path, 'steps = 7\noutput = "x"\n[rollout]\ngroup_size = 4\n[algorithm]\nname = "gspo"')
    )
    assert (config.steps, config.rollout.group_size, config.algorithm.name) == (7, 4, "gspo")
    assert config.output == Path("x")
    assert config.optimizer == Config().optimizer


def test_the_json_of_a_config_reads_back_equal():
    config = Config(steps=9, seed=3)
    assert Config.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stepz = 3", "there is no setting 'stepz'; did you mean 'steps'?"),
        ("[rollout]\ngroupsize = 3", "there is no setting 'rollout.groupsize'; did you mean 'group_size'?"),
        ("[rollout]\nzzz = 3", "there is no setting 'rollout.zzz'; choose one of prompts_per_step, group_size"),
        ("[rollout]\ntop_p = 0.9", "there is no setting 'rollout.top_p'; training samples from the full distribution"),
        ("[rollout]\ngroup_size = 1", "rollout.group_size is 1; input should be greater than or equal to 2"),
        ("[rollout]\nmax_tokens = 0", "rollout.max_tokens is 0; input should be greater than or equal to 1"),
        ("[rollout]\ntemperature = 0", "rollout.temperature is 0; input should be greater than 0"),
        ("[optimizer]\nlearning_rate = nan", "optimizer.learning_rate is nan"),
        (
            "[machine]\ncheckpoint_every = -1",
            "machine.checkpoint_every is -1; input should be greater than or equal to 0",
        ),
        ('[machine]\ncompile = "yes"', "machine.compile is yes; input should be 'auto', 'on' or 'off'"),
        ("[machine]\nmemory_limit_gb = 0", "machine.memory_limit_gb is 0; input should be greater than 0"),
        ('steps = "many"', "steps is many; input should be a valid integer"),
        ('[algorithm]\nname = "grop"', "there is no algorithm 'grop'; did you mean 'grpo'?"),
        ('[adapter]\nkind = "tinylor"', "adapter.kind is tinylor; input should be 'lora', 'dora', 'qlora'"),
        ('[adapter]\nkind = "full"\nrank = 4', "an adapter of the kind full does not use rank; leave it out"),
        ("[adapter]\nu = 4", "an adapter of the kind lora does not use u; leave it out"),
        ('[adapter]\nkind = "full"\n[algorithm.kl]\ncoefficient = 0.1', "adapter.kind full, which leaves no reference"),
        ("steps = ", "is not TOML"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_it(tmp_path, text, sentence):
    with pytest.raises(UserError) as error:
        read_config(write(tmp_path, text))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_the_example_file_spells_out_the_defaults():
    assert read_config(Path(__file__).parents[2] / "examples" / "train.toml") == Config()


def test_a_run_of_fewer_steps_than_the_warm_up_climbs_to_the_peak():
    config = check_config({"steps": 2, "optimizer": {"learning_rate": 1e-3}}, "here")
    assert config.optimizer.warmup_steps == 3
    assert [schedule(config)(step) for step in range(2)] == [5e-4, 1e-3]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the config .*none\.toml"):
        read_config(tmp_path / "none.toml")


def test_every_setting_has_a_description():
    def undocumented(section):
        for name, field in section.model_fields.items():
            if isinstance(field.default, BaseModel):
                yield from undocumented(type(field.default))
            elif not field.description:
                yield f"{section.__name__}.{name}"

    assert list(undocumented(Config)) == []


def test_several_mistakes_are_all_named():
    with pytest.raises(UserError, match=r"'a'.*'b'"):
        check_config({"a": 1, "b": 2}, "here")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[rollout]\ntemperature = 1e-30", "rollout.temperature is 1e-30, at which log-probs are not finite"),
        ("[rollout]\ntemperature = 1e30", "rollout.temperature is 1e+30; input should be less than or equal to 100"),
        ("[rollout]\ntemperature = inf", "rollout.temperature is inf"),
        ("[rollout]\nmax_episode_tokens = 4", "rollout.max_episode_tokens is 4 and rollout.max_tokens 8; an episode"),
        ("[rollout]\nprompts_per_step = 99999999999", "rollout.prompts_per_step is 99999999999; input should be less"),
        ("[optimizer]\nlearning_rate = 2", "optimizer.learning_rate is 2; input should be less than or equal to 1"),
        ("[optimizer]\nmax_skipped = 0", "optimizer.max_skipped is 0; input should be greater than or equal to 1"),
        ("[optimizer]\nupdates_per_step = 17", "updates_per_step is 17 and rollout.prompts_per_step 16"),
        ("[optimizer]\nfinal_fraction = 1.5", "optimizer.final_fraction is 1.5; input should be less than or equal"),
        ("[checkpoint]\nkeep = 0", "checkpoint.keep is 0; input should be greater than or equal to 1"),
        ("[checkpoint]\nevery = -1", "checkpoint.every is -1; input should be greater than or equal to 0"),
        ("seed = -1", "seed is -1; input should be greater than or equal to 0"),
        ("seed = 9223372036854775808", "seed is 9223372036854775808; "),
        ('steps = "many\\nlines"', "steps is many lines; input should be a valid integer"),
        (f'steps = "{"x" * 5000}"', "xxx...; input should be a valid integer"),
        (f"steps = {'9' * 5000}", "is not TOML"),
        ("rollout = 3", "rollout is 3; it is a section, so set rollout.prompts_per_step and others"),
        ("a = " + "[" * 5000, "is not TOML"),
        ("[algorithm]\nclip_low = -0.1", "algorithm.clip_low is -0.1; input should be greater than or equal to 0"),
        ("[algorithm.kl]\ncoefficient = nan", "algorithm.kl.coefficient is nan"),
    ],
)
def test_ranges_and_contradictions_are_found_in_the_file(tmp_path, text, sentence):
    with pytest.raises(UserError) as error:
        read_config(write(tmp_path, text))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('[algorithm]\nname = "cispo"\nweight_low = 3\nweight_high = 2', "set 0 <= "),
        ("[algorithm.correction]\nlevel = 'token'\nlow = 4\nhigh = 2", "the correction keeps [4.0, 2.0]; set 0 <= low"),
        ("[algorithm]\nclip_high = 0.5\ndelta = 1.2", "delta is 1.2; set it above 1 + clip_high"),
        ("[algorithm]\ntau_pos = 1.0", "the recipe grpo does not use tau_pos"),
        ('[algorithm]\nname = "bnpo"\n[algorithm.sepa]\nsteps = 4', "does not use sepa.steps"),
    ],
)
def test_contradictions_within_a_recipe_are_found_before_the_model_is_loaded(tmp_path, capsys, text, sentence):
    path = write(tmp_path, 'model = "./nowhere"\n' + text)
    assert main(["train", str(path)]) == 2
    assert sentence in capsys.readouterr().err


def test_completions_beyond_the_context_are_refused_before_the_model_loads(tmp_path, capsys, monkeypatch):
    import textpolicy.mlx.models as models

    monkeypatch.setattr(models, "load_model", None)
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    assert main(["train", f"--model={tmp_path}", "--rollout.max-tokens=65"]) == 2
    assert "a completion has 65 tokens and the context of" in capsys.readouterr().err


def test_a_config_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "run.toml").write_text("\ufeffsteps = 3\r\n", encoding="utf-8", newline="")
    assert read_config(tmp_path / "run.toml").steps == 3


def test_thousands_of_mistakes_are_told_by_the_first_of_them():
    with pytest.raises(UserError) as error:
        check_config({f"x{i}": 1 for i in range(30_000)}, "run.toml")
    assert str(error.value).count("there is no setting") == 20
    assert str(error.value).endswith("; and 29980 more mistakes")


def test_a_config_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "run.toml").write_bytes(b"steps = \xff")
    with pytest.raises(UserError, match="is not TOML"):
        read_config(tmp_path / "run.toml")
    with pytest.raises(UserError, match="cannot read the config"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ('[tracking]\nuri = "https://me:planted-7f3a@host/x"', "MLFLOW_TRACKING_PASSWORD"),
        ('[tracking]\nuri = "postgresql://me:planted-7f3a@host/x"', "MLFLOW_TRACKING_PASSWORD"),
        ('engine = "tinker"\n[tinker]\nbase_url = "http://me:planted-7f3a@host"', "TINKER_API_KEY"),
    ],
)
def test_a_password_in_an_address_is_refused_and_not_repeated(tmp_path, text, instead):
    with pytest.raises(UserError, match="would be written to the run's folder") as error:
        read_config(write(tmp_path, text))
    assert instead in str(error.value)
    assert "planted" not in str(error.value)
