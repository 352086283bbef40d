"""Settings: strict names, ranges, and sentences that say what to do."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from textpolicy.config import Config, check_config, read_config
from textpolicy.errors import UserError


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
        ("steps = 2", "optimizer.warmup_steps is 3 and steps is 2; set the warm-up to at most the steps"),
        ('[adapter]\nkind = "tinylor"', "adapter.kind is tinylor; input should be 'lora', 'dora', 'qlora'"),
        ('[adapter]\nkind = "full"\nrank = 4', "an adapter of the kind full has no use for rank; leave it out"),
        ("[adapter]\nu = 4", "an adapter of the kind lora has no use for u; leave it out"),
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
    assert read_config(Path(__file__).parents[1] / "examples" / "train.toml") == Config()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the config .*none\.toml"):
        read_config(tmp_path / "none.toml")


def test_every_setting_says_what_it_is():
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
