"""verifiers, the real library: its harness and tool servers run as processes, and our engine is the model."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from chat_tokenizers import chat_tokenizer
from two_steps import two_steps

from textpolicy.engine import Sampling
from textpolicy.environment import ToolCall, verifiers_env
from textpolicy.environment.libraries.verifiers import put_uv_on_the_path
from textpolicy.errors import UserError
from textpolicy.loop.collect import collect
from textpolicy.types import Completion

vf = pytest.importorskip("verifiers.v1", reason="verifiers is an extra: pip install 'textpolicy[verifiers]'")
put_uv_on_the_path()
if shutil.which("uv") is None:
    pytest.skip("verifiers' harnesses are installed by uv, which is not here", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # the library's own warnings are its own
TASKSETS = Path(__file__).parents[2] / "data" / "verifiers"


@pytest.fixture(autouse=True)
def tasksets(monkeypatch):
    """Our tasksets can be imported here and in the processes that verifiers starts."""
    monkeypatch.syspath_prepend(str(TASKSETS))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TASKSETS), os.environ.get("PYTHONPATH", "")]))


class Speaker:
    """An engine that answers by the end of the prompt, and records all prompts and the size of each call."""

    def __init__(self, tokenizer, answer, truncated=False):
        self.tokenizer, self.answer, self.truncated, self.seen, self.sizes = tokenizer, answer, truncated, [], []

    def sample(self, prompts, n, sampling):
        self.seen += [list(p) for p in prompts]
        self.sizes.append(len(prompts))
        return [[self._said(self.tokenizer.decode(p))] for p in prompts]

    def _said(self, prompt):
        letters = [self.tokenizer.convert_tokens_to_ids(c) for c in self.answer(prompt).replace(" ", "Ġ")]
        tokens = letters if self.truncated else [*letters, self.tokenizer.eos_token_id]
        return Completion(np.array(tokens, np.int32), np.full(len(tokens), -1, np.float32), truncated=self.truncated)


def call(**arguments):
    return f"<tool_call>{json.dumps({'name': 'secret_of', 'arguments': arguments})}</tool_call>"


def look_up(prompt):
    """Call the tool once, then repeat its result."""
    if "<tool_response>" not in prompt:
        return call(name="ann" if "ann?" in prompt else "bob")
    return "it is " + prompt.split("<tool_response>\n")[-1][:4]


def test_a_single_turn_environment_is_played_and_scored_by_verifiers():
    tokenizer = chat_tokenizer("chatml")
    env = verifiers_env("tp_sums", tokenizer=tokenizer)
    assert (len(env), env.prompt_text(3)) == (4, "What is 3 + 3?")
    engine = Speaker(tokenizer, lambda prompt: "6")
    episodes = collect(engine, env, [3, 1], 2, Sampling(8), first_group=5)
    assert [(e.group, e.reward, e.is_correct) for e in episodes] == [(5, 1.0, True)] * 2 + [(6, 0.0, False)] * 2
    assert [e.prompt for e in episodes] == ["What is 3 + 3?"] * 2 + ["What is 1 + 1?"] * 2
    assert engine.sizes == [4]  # all at a time
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 3 + 3?"}], add_generation_prompt=True, return_dict=False
    )
    assert episodes[0].tokens.tolist() == [*expected, tokenizer.convert_tokens_to_ids("6"), tokenizer.eos_token_id]
    assert not episodes[0].truncated


def test_a_tool_environment_calls_its_server_and_keeps_every_token():
    tokenizer = chat_tokenizer("chatml")
    env = verifiers_env("tp_lookup", tokenizer=tokenizer)
    engine = Speaker(tokenizer, look_up)
    episodes = collect(engine, env, [0, 1], 1, Sampling(200))
    assert [e.reward for e in episodes] == [1.0, 1.0]
    assert engine.sizes == [2, 2]
    for place, episode in enumerate(episodes):
        starts = np.flatnonzero(episode.mask & ~np.append(False, episode.mask[:-1]))
        assert [episode.tokens[:start].tolist() for start in starts] == engine.seen[place::2]
    assert "secret_of" in tokenizer.decode(episodes[0].tokens[~episodes[0].mask])
    assert "7141" in episodes[0].text


def test_a_turn_that_is_cut_off_truncates_the_episode():
    tokenizer = chat_tokenizer("chatml")
    env = verifiers_env("tp_sums", tokenizer=tokenizer, limit=1)
    [episode] = collect(Speaker(tokenizer, lambda prompt: "6", truncated=True), env, [0], 1, Sampling(1))
    assert episode.truncated


def test_a_turn_without_room_is_refused_and_the_episode_truncated():
    tokenizer = chat_tokenizer("chatml")
    env = verifiers_env("tp_lookup", tokenizer=tokenizer, limit=1, max_episode_tokens=210)
    engine = Speaker(tokenizer, look_up)
    [episode] = collect(engine, env, [0], 1, Sampling(200))
    assert engine.sizes == [1]
    assert (episode.truncated, episode.reward) == (True, 0.0)
    assert episode.mask[-1]


def test_an_error_of_the_engine_reaches_the_caller():
    class Broken(Speaker):
        def sample(self, prompts, n, sampling):
            raise ZeroDivisionError("in the engine")

    tokenizer = chat_tokenizer("chatml")
    env = verifiers_env("tp_sums", tokenizer=tokenizer, limit=1)
    with pytest.raises(ZeroDivisionError, match="in the engine"):
        collect(Broken(tokenizer, str), env, [0], 1, Sampling(4))


def test_the_uv_beside_this_python_is_found_without_an_activated_environment(monkeypatch, tmp_path):
    (tmp_path / "uv").write_text("")
    (tmp_path / "uv").chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    put_uv_on_the_path()
    assert os.environ["PATH"] == f"/nowhere{os.pathsep}{tmp_path}"
    put_uv_on_the_path()
    assert os.environ["PATH"] == f"/nowhere{os.pathsep}{tmp_path}"


def test_a_taskset_that_is_not_there_is_one_sentence():
    with pytest.raises(UserError, match="verifiers cannot load the taskset 'tp_nothing'"):
        verifiers_env("tp_nothing", tokenizer=chat_tokenizer("chatml"))


@pytest.mark.parametrize("taskset", ["tp_sums", "tp_lookup"])
def test_the_embedded_model_trains_two_steps(taskset, fresh_smollm_engine):
    engine, tokenizer = fresh_smollm_engine

    def parse(text):
        """Anything but a secret is a call, so that an untrained model calls the tool too."""
        return (
            [] if taskset == "tp_sums" or "2820" in text or len(text) > 40 else [ToolCall("secret_of", {"name": "ann"})]
        )

    env = verifiers_env(taskset, tokenizer=tokenizer, limit=2, parse=parse)
    two_steps(engine, env, 24, group_size=2)
