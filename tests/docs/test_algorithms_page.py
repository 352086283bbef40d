"""docs/algorithms.md agrees with the code about every recipe: defaults, sources, settings and metrics."""

import re
import shlex
import tomllib
from dataclasses import MISSING, fields, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import recipe

from textpolicy.algorithms import ALGORITHMS, Algorithm
from textpolicy.cli.main import main
from textpolicy.config.flags import parse
from textpolicy.config.recipe import configure
from textpolicy.config.settings import Config, check_config
from textpolicy.engine import Sampling
from textpolicy.environment.single_turn import TextGenerationEnv
from textpolicy.loop.train import Schedule, train
from textpolicy.losses import KL, Correction, Surrogate
from textpolicy.types import Completion, Episode

PAGE = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text(encoding="utf-8")
STATED = re.compile(r"`(\w+) = ([^`]+)`")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def sections():
    """Name -> text of every recipe's section."""
    recipes = PAGE.split("\n## Recipes\n")[1].split("\n## ")[0]
    parts = recipes.split("\n### ")[1:]
    return {part.split("\n")[0]: part for part in parts}


def stated_defaults(section):
    paragraph = section.split("\nDefaults: ")[1].split("\n\n")[0]
    return {name: tomllib.loads(f"value = {value}")["value"] for name, value in STATED.findall(paragraph)}


def defaults_in_code(name):
    """All values of a recipe's parts, how the loss reads them, and what else is not as in a bare recipe."""
    made = ALGORITHMS[name]
    parts = [made.baseline, made.surrogate.objective, *made.stages, *filter(None, [made.pooling])]
    own = {f.name: getattr(part, f.name) for part in parts for f in fields(part)}
    own |= {"ratio": made.surrogate.ratio, "aggregation": made.aggregation}
    apart = ("baseline", "stages", "surrogate", "pooling", "grams", "summary", "paper")
    plain = {f.name: f.default for f in fields(Algorithm) if f.name not in apart and f.default is not MISSING}
    own |= {f: getattr(made, f) for f, value in plain.items() if getattr(made, f) != value}
    own |= {f.name: getattr(made.surrogate, f.name) for f in fields(Surrogate) if f.name != "objective"}
    return {f: value for f, value in own.items() if value is not None}


def test_the_page_has_a_section_for_every_row_in_the_order_of_the_table():
    assert list(sections()) == list(ALGORITHMS)


def test_every_section_names_its_source():
    for name, made in ALGORITHMS.items():
        source = re.search(r"^Source: (.*)$", sections()[name], re.MULTILINE)
        assert source, name
        assert made.paper in source[1], name


def test_every_section_states_the_defaults_of_the_code():
    for name in ALGORITHMS:
        assert stated_defaults(sections()[name]) == defaults_in_code(name), name


def test_every_section_of_a_recipe_with_grams_counts_the_built_in_phrases():
    with_grams = {name: made.grams for name, made in ALGORITHMS.items() if made.grams is not None}
    assert with_grams
    for name, grams in with_grams.items():
        assert f"those of the {len(grams.phrases)} built-in phrases" in sections()[name], name


def test_every_section_fits_a_screen_and_advises_when_to_use_the_recipe():
    for name, section in sections().items():
        assert 20 <= len(section.splitlines()) <= 42, name
        assert "\nUse it " in section, name
        assert section.count("```text\n") == 1, name


def test_the_python_blocks_run_top_to_bottom_and_print_the_output_in_their_comments(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for block in blocks("python"):
        exec(compile(block, "docs/algorithms.md", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(np.array([1.0] * 3 + [-1.0] * 5 + [0.0] * 8))
    assert float(lines[1]) == pytest.approx(1)
    assert lines[2] == "[False  True  True  True  True False False]"
    spared = [float(number) for number in " ".join(lines[3:]).strip("[]").split()]
    assert spared == pytest.approx([0.5**0.5] * 3 + [-0.5 * 0.5**0.5] * 5 + [0] * 8, abs=2e-6)
    assert (tmp_path / "grams.json").exists()


def test_the_settings_of_every_toml_block_make_a_run():
    assert blocks("toml")
    for block in blocks("toml"):
        config = check_config(tomllib.loads(block), "docs/algorithms.md")
        assert config != Config(), block
        configure(config)


def test_every_command_works():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert lines
    for line in lines:
        program, command, *arguments = shlex.split(line)
        assert program == "textpolicy", line
        if command == "train":
            configure(parse(Config, arguments, command))
        else:
            assert main([command, *arguments]) == 0, line


def test_every_block_names_its_language():
    opening = re.findall(r"^```(\w*)$", PAGE, re.MULTILINE)[::2]
    assert set(opening) == {"text", "bash", "python", "toml"}


def test_every_link_within_the_page_leads_to_a_heading():
    headings = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", PAGE, re.M)}
    assert set(re.findall(r"\]\(#([^)]*)\)", PAGE)) <= headings


def test_groups_that_agree_single_completions_and_unscorable_ones_get_exactly_0_in_every_recipe():
    rewards = [1.0, 0.0, float("nan"), 1.0, 1.0, 1.0, 0.0, 0.0]
    groups = [0, 0, 0, 1, 1, 2, 3, 3]
    lengths = np.array([3, 5, 2, 4, 1, 6, 2, 3])
    rng = np.random.default_rng(0)
    episodes = []
    for reward, group, tokens in zip(rewards, groups, lengths, strict=True):
        entropy = rng.uniform(0.1, 2, tokens).astype(np.float32)
        completion = Completion(np.arange(1, tokens + 1, dtype=np.int32), -entropy, entropy)
        pieces = (" then",) * tokens
        episodes.append(Episode.from_completion([7], completion, reward=reward, group=group, pieces=pieces))
    learns = np.repeat(np.arange(8) < 2, lengths)
    for name in ALGORITHMS:
        advantage = recipe(name).tokens(episodes).advantage
        assert (advantage[~learns] == 0).all(), name
        assert (advantage[learns] != 0).all(), name


def test_the_ramp_of_sepa_is_as_slow_as_the_page_states():
    controller = ALGORITHMS["sepa"].controller()
    strengths = [controller.advance(1.0, np.array([0.5, 1.0])) for _ in range(551)]
    assert "a run of 64 steps never passes 0.026" in PAGE
    assert max(strengths[:64]) == pytest.approx(0.026)
    assert "550 steps after the gate opened" in PAGE
    assert strengths[550] == 1 > strengths[549]


class Numbers:
    """A tokenizer whose text is the ids themselves."""

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(str(i) for i in ids)


def test_the_table_of_metrics_names_everything_a_step_writes(tiny_engine):
    def reward(prompt, completion, example):
        right = len(completion) % 2 == 1
        return {"reward": float(right), "is_correct": right}

    made = recipe("sepa")
    surrogate = replace(made.surrogate, kl=KL(0.1), correction=Correction("token"))
    written = set()
    train(
        tiny_engine,
        TextGenerationEnv(["1 2", "3", "4 5 6"], reward, max_tokens=6, tokenizer=Numbers()),
        replace(made, surrogate=surrogate, resample=2, entropy_bonus=0.01),
        schedule=Schedule(1e-3, steps=2, updates=2),
        prompts_per_step=3,
        group_size=8,
        sampling=Sampling(max_tokens=6),
        on_step=lambda step, row, episodes: written.update(row),
    )
    table = PAGE.split("\n## What a step writes\n")[1].split("\n## ")[0]
    first_cells = re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE)
    assert {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)} == written
