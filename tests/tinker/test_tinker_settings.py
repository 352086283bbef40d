"""--engine tinker: what it refuses before anything is spent, and that no key is ever shown."""

import socket
import threading
from contextlib import contextmanager

import pytest

from textpolicy.cli.main import main
from textpolicy.config.recipe import configure
from textpolicy.config.settings import Config, check_config
from textpolicy.errors import ServiceError, UserError
from textpolicy.tinker.build import kept, refuse_unhonoured
from textpolicy.tinker.service import Service, answers


def settings(**sections):
    return check_config({"engine": "tinker", **sections}, "here")


def test_the_defaults_run_on_either_engine():
    for engine in ("mlx", "tinker"):
        config = check_config({"engine": engine}, "here")
        assert configure(config) == configure(Config())
    refuse_unhonoured(settings(), configure(settings()))


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"adapter": {"kind": "dora"}}, "adapter.kind is dora"),
        ({"adapter": {"kind": "full"}}, "adapter.kind is full"),
        ({"adapter": {"layers": 4}}, "adapter.layers is set"),
        ({"adapter": {"modules": ["q_proj"]}}, "adapter.modules is set"),
        ({"adapter": {"rank_stabilised": True}}, "adapter.rank_stabilised is set"),
        ({"adapter": {"alpha": 16}}, "adapter.alpha is 16 and is 32"),
        ({"algorithm": {"kl": {"coefficient": 0.1}}}, "algorithm.kl is set"),
        ({"algorithm": {"correction": {"level": "token"}}}, "algorithm.correction is set"),
        ({"algorithm": {"off_policy_limit": 1.0}}, "algorithm.off_policy_limit is set"),
        ({"algorithm": {"name": "gtpo", "uncertainty": "entropy"}}, "algorithm.uncertainty is entropy"),
        ({"algorithm": {"name": "gtpo_paper"}}, "the recipe gtpo_paper needs exact entropies"),
        ({"algorithm": {"top_entropy": 0.2}}, "algorithm.top_entropy needs exact entropies"),
        ({"algorithm": {"name": "echo"}}, "algorithm.echo is 0.1"),
        ({"algorithm": {"entropy_bonus": 0.01}}, "algorithm.entropy_bonus or entropy_target is set"),
        ({"algorithm": {"entropy_target": 0.5}}, "algorithm.entropy_bonus or entropy_target is set"),
        ({"algorithm": {"name": "sapo"}}, "no loss for SoftGate"),
        ({"algorithm": {"name": "rloo"}}, "ratio per sequence-sum"),
        ({"machine": {"checkpoint_every": 1}}, "machine.checkpoint_every applies to this machine"),
        ({"machine": {"micro_batch_tokens": 100}}, "machine.micro_batch_tokens applies to this machine"),
        ({"rollout": {"temperature": 0.7}}, "rollout.temperature is 0.7"),
        (
            {"tinker": {"reduction": "mean"}, "optimizer": {"max_grad_norm": 0.5}},
            "optimizer.max_grad_norm is 0.5",
        ),
    ],
)
def test_a_setting_that_it_cannot_honour_is_named(sections, named):
    config = settings(**sections)
    with pytest.raises(UserError, match=named):
        refuse_unhonoured(config, configure(config))


def test_the_command_refuses_before_it_connects(capsys):
    flags = ["--engine=tinker", "--tinker.base-url=http://127.0.0.1:9", "--adapter.kind=dora"]
    assert main(["train", *flags]) == 2
    assert "adapter.kind is dora" in capsys.readouterr().err


def test_settings_that_tinker_supports_are_not_refused():
    config = settings(
        rollout={"temperature": 0.7},
        tinker={"untempered": True},
        algorithm={"kl": {"coefficient": 0.1, "place": "reward"}},
    )
    refuse_unhonoured(config, configure(config))


def test_the_section_tinker_is_refused_under_another_engine():
    with pytest.raises(UserError, match=r"tinker\.patience is set and engine is mlx"):
        check_config({"tinker": {"patience": 3}}, "here")


def test_settings_written_down_by_a_run_read_back():
    for config in (Config(), settings(tinker={"patience": 3})):
        assert check_config(config.model_dump(mode="json"), "config.json") == config


# ---- the key


def test_a_key_of_the_wrong_form_is_refused_without_being_shown(monkeypatch):
    monkeypatch.setenv("TINKER_API_KEY", "sk-planted-secret")
    with pytest.raises(UserError, match="they start with tml-") as refused:
        Service("http://127.0.0.1:9")
    assert "planted" not in str(refused.value)


def test_the_hosted_service_without_a_key_is_one_sentence(no_tinker_account, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # where a key may be stored
    with pytest.raises(ServiceError, match="set TINKER_API_KEY to your key"):
        Service().capabilities()


def test_no_server_is_one_sentence(capsys):
    assert main(["train", "--engine=tinker", "--tinker.base-url=http://127.0.0.1:9"]) == 2
    assert "no Tinker server answers at http://127.0.0.1:9; start one with" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["http://[::1", "http://localhost:port", "http://my host:8000", "localhost:8000"])
def test_an_invalid_address_is_one_sentence(address, no_tinker_account, capsys):
    assert main(["train", "--engine=tinker", f"--tinker.base-url={address}"]) == 2
    output = capsys.readouterr().err
    assert f"no Tinker server answers at {address}; start one with" in output
    assert len(output.splitlines()) == 1


@contextmanager
def saying(answer):
    """The address of something that says just this to whoever asks first."""

    def serve():
        caller, _ = listener.accept()
        with caller:
            caller.recv(4096)
            caller.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize(
    ("answer", "lives"),
    [
        (b"HTTP/1.0 200 OK\r\n\r\n", True),
        (b"HTTP/1.0 404 Not Found\r\n\r\n", True),  # a server without such a page
        (b"HTTP/1.0 503 Service Unavailable\r\n\r\n", False),
        (b"SSH-2.0-OpenSSH_9.6\r\n", False),
        (b"", False),
    ],
)
def test_a_server_lives_if_it_answers_as_one(answer, lives):
    with saying(answer) as address:
        assert answers(address) is lives


# ---- a run's adapter


@pytest.mark.parametrize("content", [None, "{", "{}", "[]", "null"])
def test_an_adapter_folder_without_a_path_on_the_server_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "tinker.json").write_text(content)
    with pytest.raises(UserError, match=r"tinker\.json (has no path of the adapter on the server|is not .*JSON)"):
        kept(settings(), tmp_path)
