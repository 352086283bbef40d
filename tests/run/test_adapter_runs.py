"""Every kind of adapter: what it trains of the built-in model; three steps, and a run of 13 numbers, of a small one."""

import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from textpolicy.cli.main import main
from textpolicy.config.recipe import configure
from textpolicy.config.settings import Config
from textpolicy.engine import Sampling
from textpolicy.environment.single_turn import TextGenerationEnv
from textpolicy.loop.train import train
from textpolicy.mlx.adapters.merging import trainable
from textpolicy.run.assembly import build_engine, schedule

TRAINED = {  # numbers that train, of the model's 134,515,008
    "lora": 16 * 30 * 10_176,  # in + out of the seven linear layers of each of 30 blocks
    "dora": 16 * 30 * 10_176 + 30 * (576 + 192 + 192 + 576 + 1536 + 1536 + 576),
    "qlora": 16 * 30 * 10_176,
    "full": 134_515_008,
    "lora_xs": 30 * 7 * 16 * 16,
    "tinylora": 13,
}


def letters(prompt, completion, example, **kwargs):
    return float(len(completion))


TELLS = """
import zlib

from textpolicy.tasks import task_from_rows


def tells(prompt, completion, example, **kwargs):
    return zlib.crc32(completion.encode()) / 2**32


def task():
    return task_from_rows([{"question": f"Name {n} things."} for n in range(20)], tells, name="tells", max_tokens=8)
"""  # a task whose reward tells all texts apart, whatever the model


def is_quantised(model):
    return any(isinstance(m, nn.QuantizedLinear) for m in model.modules())


@pytest.mark.parametrize("kind", TRAINED)
def test_an_adapter_of_the_kind_trains_so_many_numbers_of_the_built_in_model(kind):
    engine, _ = build_engine(Config(adapter={"kind": kind}, machine={"threads": 1}))
    assert sum(value.size for value in trainable(engine.model).values()) == TRAINED[kind]
    assert is_quantised(engine.model) == (kind == "qlora")


@pytest.mark.usefixtures("small_built_in")
@pytest.mark.parametrize("kind", TRAINED)
def test_three_steps_move_exactly_the_trainable_parameters_of_the_kind(kind):
    sizes = {"prompts_per_step": 1, "group_size": 4, "max_tokens": 2}
    config = Config(adapter={"kind": kind}, steps=3, rollout=sizes, machine={"threads": 1})
    engine, tokenizer = build_engine(config)
    env = TextGenerationEnv(["1 2 3", "9 8 7"], letters, max_tokens=2, tokenizer=tokenizer, chat=False)
    before, rows = dict(tree_flatten(engine.model.parameters())), []
    train(
        engine,
        env,
        configure(config),
        schedule=schedule(config),
        **{name: sizes[name] for name in ("prompts_per_step", "group_size")},
        sampling=Sampling(2),
        on_step=lambda step, row, episodes: rows.append(row),
    )
    own = trainable(engine.model)
    moved = {name for name, a in tree_flatten(engine.model.parameters()) if not mx.array_equal(a, before[name])}
    assert [row["updated"] for row in rows] == [1, 1, 1]
    assert moved == set(own)
    assert is_quantised(engine.model) == (kind == "qlora")


@pytest.mark.usefixtures("small_built_in")
def test_a_run_of_thirteen_numbers_is_trained_kept_and_judged(tmp_path, capsys):
    run, task = tmp_path / "run", tmp_path / "tells.py"
    task.write_text(TELLS)
    small = [
        f"--task={task}",
        "--rewards.correct-from=0.5",
        "--steps=2",
        "--optimizer.warmup-steps=1",
        "--evaluation.problems=4",
        "--evaluation.every=2",
    ]
    sizes = ["--rollout.prompts-per-step=2", "--rollout.group-size=8", "--machine.threads=1"]
    assert main(["train", f"--output={run}", "--adapter.kind=tinylora", "--adapter.u=13", *small, *sizes]) == 0
    arrays = mx.load(str(run / "adapter" / "adapters.safetensors"))
    trained = [value for name, value in arrays.items() if name.endswith(".v")]
    assert [value.shape for value in trained] == [(1, 13)]
    steps = [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if row["kind"] == "train"]
    assert any(row["updated"] for row in steps)
    assert steps[0]["learning_rate"] == 0.005
    assert main(["eval", f"--adapter={run}", "--problems=4", "--show=0", "--threads=1"]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert f"{task}, test: {summary['test_after']:.1%}" in capsys.readouterr().out
