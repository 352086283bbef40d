"""Fixtures shared by the tests: a tiny Llama, episodes made up at random, the built-in model."""

from __future__ import annotations

import gc
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Self

# One BLAS thread, here and in processes that tests start: two wait for each other where the machine is busy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MLX_ENABLE_TF32", "0")  # or float32 has 11 bits on CUDA and on an M5, and tolerances do not hold

import hypothesis
import numpy as np
import pytest
from torch_peer import torch  # noqa: F401  (a fixture)

import textpolicy.mlx  # noqa: F401  (before mlx, which thereby gets its fast BLAS)
from textpolicy.types import Completion, Episode

hypothesis.settings.register_profile("patient", deadline=None)  # a busy machine makes no example wrong
hypothesis.settings.load_profile("patient")

VOCABULARY = 300
WORDS = (" let me", " check", " then", " so", " seven", "")  # of made-up completions; the first two make a gram


KERNELS = "mlx/backend/cpu/compiled_preamble.h"  # what MLX includes in each kernel that it compiles on a CPU
COMPILER = """#!/bin/sh
# g++ for MLX, which compiles some hundred kernels in the tests: the header, most of the work, is compiled once.
# A compiler for which the result does not fit reads the header itself.
[ -e {to} ] || {{ {gxx} -std=c++17 -O3 -Wall -fPIC -shared -I{include} -x c++-header {include}/{header} -o {to}.$$ \\
    2> {to}.log && mv {to}.$$ {to}; }}
exec {gxx} -I{folder} "$@"
"""


def pytest_configure(config: pytest.Config) -> None:
    """MLX finds a g++ that knows its header; the processes of pytest-xdist have it from this one."""
    gxx = shutil.which("g++")
    if hasattr(config, "workerinput") or sys.platform != "linux" or gxx is None:
        return
    folder = Path(tempfile.mkdtemp(prefix="textpolicy-gxx-"))
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    include = Path(find_spec("mlx.core").origin).parent / "include"
    to = folder / "include" / f"{KERNELS}.gch"
    to.parent.mkdir(parents=True)
    words = {"gxx": gxx, "to": to, "folder": folder / "include", "include": include, "header": KERNELS}
    (folder / "g++").write_text(COMPILER.format_map({name: shlex.quote(str(word)) for name, word in words.items()}))
    (folder / "g++").chmod(0o755)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture
def interruptible():
    """Ctrl-C interrupts, also where the tests run in the background and were told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of another device's branch are skipped."""
    import mlx.core as mx

    from textpolicy.mlx.kernels import cuda

    held = {"cpu": mx.default_device() == mx.Device(mx.cpu), "cuda": cuda.is_default()}
    for item in items:
        for device in (name for name, here in held.items() if not here and item.get_closest_marker(name)):
            item.add_marker(pytest.mark.skip(reason=f"holds a branch of another device: {device}"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    """Of several processes one has the tests of a file, so that fixtures are made once, and one all of Tinker's.

    The groups that pytest-xdist 3.8 writes into a test's name are lost in pytest 9.2, so they are decided here.
    """
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class OfAFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "tinker" if "tinker" in file else file

    return OfAFile(config, log)


def random_episodes(rng: np.random.Generator, groups: int = 4, size: int = 4) -> list[Episode]:
    """Episodes with prompts of a common start, completions of 1 to 8 tokens and 0/1 rewards."""
    out = []
    for g in range(groups):
        prompt = [5, 6, *rng.integers(1, VOCABULARY, rng.integers(1, 5)).tolist()]
        for _ in range(size):
            t = int(rng.integers(1, 9))
            completion = Completion(
                rng.integers(1, VOCABULARY, t).astype(np.int32),
                rng.uniform(-6, -5, t).astype(np.float32),
                rng.uniform(0, 2, t).astype(np.float32),
            )
            pieces = tuple(rng.choice(WORDS, t).tolist())
            reward = float(rng.random() < 0.5)
            out.append(Episode.from_completion(prompt, completion, reward=reward, group=g, pieces=pieces))
    return out


@contextmanager
def files_of_at_most(size: int):
    """No file of this process may grow beyond ``size`` bytes, as where a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def recipe(name: str):
    """A recipe as a run with completions of at most 8 tokens sets it up."""
    from textpolicy.algorithms import algorithm

    return replace(algorithm(name), length=8.0)


@pytest.fixture
def tiny_engine():
    """A two-layer Llama with random LoRA matrices behind the engine; token 0 stops."""
    return make_tiny_engine(VOCABULARY)


def make_tiny_engine(vocabulary: int):
    """As the fixture, with a vocabulary of one's own."""
    import mlx.core as mx

    from textpolicy.mlx.adapters.merging import attach_lora
    from textpolicy.mlx.engine import MLXEngine

    model = attach_lora(tiny_llama(vocabulary), rank=4)
    for module in model.modules():
        if "lora_b" in module:
            module.lora_b = 0.3 * mx.random.normal(module.lora_b.shape)
    mx.eval(model.parameters())
    return MLXEngine(model, stop=[0], micro_batch_tokens=10_000)


def tiny_llama(vocabulary: int, seed: int = 0, layers: int = 2):
    """A small Llama with random weights."""
    import mlx.core as mx
    from mlx_lm.models import llama

    mx.random.seed(seed)
    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=32,
        num_hidden_layers=layers,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=vocabulary,
    )
    model = llama.Model(arguments)
    mx.eval(model.parameters())
    return model


@pytest.fixture(scope="session")
def smollm():
    """The built-in model and its tokenizer, loaded once; tests must not change it."""
    from textpolicy.mlx.models import load_model

    return load_model("smollm2-135m")


@pytest.fixture
def fresh_smollm_engine():
    """The built-in model with a fresh adapter behind the engine, and its tokenizer; a test may train it."""
    from textpolicy.mlx.adapters.merging import attach_lora
    from textpolicy.mlx.engine import MLXEngine
    from textpolicy.mlx.models import load_model

    model, tokenizer = load_model("smollm2-135m")
    return MLXEngine(attach_lora(model, rank=4), stop=tokenizer.eos_token_ids), tokenizer


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """A folder with two narrow layers of random weights, in 4 bits as the built-in model's, and with its tokenizer."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama

    from textpolicy.mlx.models import find_model

    real = find_model("smollm2-135m")
    folder = tmp_path_factory.mktemp("cache") / "models" / real.name
    shutil.copytree(real, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((real / "config.json").read_text())
    del config["head_dim"]
    config |= {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config["num_hidden_layers"] = 2
    mx.random.seed(0)
    model, bits = llama.Model(llama.ModelArgs.from_dict(config)), config["quantization"]
    nn.quantize(
        model, group_size=32, bits=4,
        class_predicate=lambda path, part: hasattr(part, "to_quantized") and bits.get(path, True),
    )  # fmt: skip
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def small_built_in(small_model, monkeypatch):
    """The built-in model is the small one, here and in processes that the test starts."""
    monkeypatch.setenv("TEXTPOLICY_CACHE", str(small_model.parents[1]))


@pytest.fixture
def registries():
    """A test may register rewards and verifiers as it likes; those from before come back."""
    from textpolicy.rewards import REWARD_REGISTRY, VERIFIER_REGISTRY, clear_registries

    saved = dict(REWARD_REGISTRY), dict(VERIFIER_REGISTRY)
    yield
    clear_registries()
    REWARD_REGISTRY.update(saved[0])
    VERIFIER_REGISTRY.update(saved[1])


# ---- Tinker servers with a tiny random model, each started once for all tests: our own, and SkyRL's as a peer

TINKER_RANK = 4


@pytest.fixture(scope="session")
def served_by(tmp_path_factory):
    """``served_by(name)``: ``textpolicy serve`` in a process of its own, with a folder of that name."""
    from textpolicy.tinker.server.server import tiny_model_folder

    root = tmp_path_factory.mktemp("tinker")
    return lambda name: ServerProcess(tiny_model_folder(), root / name)


@pytest.fixture(scope="session")
def tinker_server(served_by):
    """A server for all tests that leave it alive."""
    with served_by("shared") as running:
        yield running


class ServerProcess:
    """``textpolicy serve`` in a process of its own: its model is ``name``, at ``url``."""

    def __init__(self, model: Path, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name, self.folder = str(model), folder
        command = [sys.executable, "-m", "textpolicy", "serve", self.name, "--port=0", f"--folder={folder}"]
        with (folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        said = self.process.stdout.readline()  # which comes when it serves, or when it has ended
        assert said.startswith("serving"), said + (folder / "server.log").read_text()
        self.url = next(word.rstrip(";") for word in said.split() if word.startswith("http"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="session")
def skyrl_can_run():
    """Skip where SkyRL's environment has not been made."""
    from textpolicy.tinker.server.environment import environment_folder

    if not environment_folder().exists():
        pytest.skip("SkyRL's environment (800 MB) is not there; scripts/skyrl_env.py makes it")


@pytest.fixture(scope="session")
def skyrl_server(tmp_path_factory, skyrl_can_run):
    """SkyRL's server."""
    from textpolicy.tinker.server.server import LocalServer, ServerSettings, tiny_model_folder

    folder = tmp_path_factory.mktemp("skyrl")
    with LocalServer(ServerSettings(model=tiny_model_folder(), folder=folder, rank=TINKER_RANK)) as running:
        yield running


@pytest.fixture
def no_tinker_account(monkeypatch):
    """No key, address or telemetry from outside; connections that the SDK leaves open are ignored."""
    warnings.filterwarnings("ignore", "unclosed", ResourceWarning)  # pytest takes it back after the test
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    for name in ("TINKER_API_KEY", "TINKER_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    yield
    gc.collect()


@pytest.fixture
def connected(no_tinker_account):
    """``connected(server, **settings)``: engines on a server, closed when the test is over."""
    from textpolicy.tinker.engine import TinkerEngine

    engines = []

    def connect(server, **settings):
        args = {"rank": TINKER_RANK, "seed": 3, "base_url": server.url, **settings}
        engines.append(TinkerEngine.connect(server.name, **args))
        return engines[-1]

    yield connect
    for engine in engines:
        engine.close()


@pytest.fixture
def tinker(tinker_server, connected):
    """``tinker(**settings)``: engines on our server, closed when the test is over."""
    return partial(connected, tinker_server)


# ---- our own server of the Tinker API, with the model of NumPy in tests/serve/made_model.py


@pytest.fixture
def made():
    """The model that ``server`` serves."""
    from made_model import MadeModel

    return MadeModel()


@pytest.fixture
def server(made, tmp_path):
    """A server in a thread of this process."""
    from running_server import running

    with running([made], tmp_path / "server") as started:
        yield started


@pytest.fixture
def connect(server, no_tinker_account):
    """``connect()``: clients of the server from the real SDK, closed when the test is over."""
    tinker = pytest.importorskip("tinker", reason="the clients are the Tinker SDK's")
    warnings.filterwarnings("ignore", category=FutureWarning, module="tinker")
    clients = []

    def client(url=None, key="tml-test"):
        clients.append(tinker.ServiceClient(base_url=url or server.url, api_key=key))
        return clients[-1]

    yield client
    for each in clients:
        each.close("success").result()
