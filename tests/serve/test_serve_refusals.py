"""What cannot be is one sentence with the right status, and leaves server and client usable."""

import errno
import json

import numpy as np
import pytest
from asking import Asking, a_pass, loss_of
from made_model import V
from running_server import running

from textpolicy.cli.main import main
from textpolicy.serve import api, messages
from textpolicy.serve.checkpoints import Name

SENTENCE = {"error", "category"}


@pytest.fixture
def ask(server):
    return Asking(server.url)


def refused(ask, model, body, seq=1):
    """The sentence that a pass over data ends with, after which the model can still be trained."""
    status, promise = ask("forward_backward", body)
    assert status == 200
    found = ask.result(promise["request_id"])
    assert found.keys() == SENTENCE
    assert found["category"] == "user"
    assert "\n" not in found["error"]
    assert loss_of(ask.result(ask.pass_over(model, seq + 1, [[1, 2]])[1]["request_id"])) > 0
    return found["error"]


def test_data_that_cannot_be_are_refused_by_name(ask):
    _, model = ask.model(seed=1)
    wrong = {
        "different lengths": a_pass(model, 1, [([1, 2, 3], {"target_tokens": [2, 3]})]),
        f"has the token {V}": a_pass(model, 3, [[1, V, 2]]),
        "importance_sampling": a_pass(model, 5, [[1, 2]], loss="stable_reinforce"),
        "no loss": a_pass(model, 7, [[1, 2]], loss="ppo?"),
    }
    for seq, (words, body) in zip((1, 3, 5, 7), wrong.items(), strict=True):
        assert words in refused(ask, model, body, seq)


@pytest.mark.parametrize(("chunk", "words"), [("image", "an image"), ("dmel", "audio")])
def test_pictures_and_sound_are_refused_by_name(ask, chunk, words):
    _, model = ask.model(seed=1)
    made = messages.parsed_pass(a_pass(model, 1, [[1, 2]]))
    getattr(made.data[0].model_input.add(), chunk).SetInParent()
    assert f"a chunk that is {words}" in refused(ask, model, made.SerializeToString())


def test_a_tensor_whose_shape_does_not_fit_its_values_is_refused(ask):
    _, model = ask.model(seed=1)
    made = messages.parsed_pass(a_pass(model, 1, [[1, 2]]))
    made.data[0].loss_fn_inputs["target_tokens"].shape[:] = [7]
    assert "target_tokens of datum 0 is no array of shape (7,)" in refused(ask, model, made.SerializeToString())


def test_a_sparse_tensor_is_the_dense_one_with_zeros():
    made = messages.parsed_pass(a_pass("m", 1, [[1, 2, 3]]))
    tensor = made.data[0].loss_fn_inputs["weights"]
    tensor.sparse_csr.values = np.float32([0.5, 0.25, 1]).tobytes()
    tensor.sparse_csr.crow_indices = np.int64([0, 2, 3]).tobytes()
    tensor.sparse_csr.col_indices = np.int64([0, 3, 1]).tobytes()
    tensor.shape[:], tensor.dtype = [2, 4], 1
    [datum] = messages.read_pass(made).data
    np.testing.assert_array_equal(datum.inputs["weights"], [[0.5, 0, 0, 0.25], [0, 1, 0, 0]])


def test_a_body_that_is_no_protobuf_is_refused(ask):
    status, answer = ask("forward_backward", b"\xff\xfe no protobuf")
    assert (status, "ForwardBackwardRequest" in answer["detail"]) == (400, True)


def test_a_body_that_is_too_large_or_packed_is_refused(ask, monkeypatch):
    monkeypatch.setattr(api, "LARGEST", 1000)
    assert ask("create_session", b"[" * 1001)[0] == 413
    assert ask("create_session", b"{}", content_encoding="zstd")[0] == 415
    assert ask("create_session", b"{")[0] == 400
    assert ask("create_session", {"tags": []})[0] == 200


@pytest.mark.parametrize(
    ("route", "sent"),
    [
        ("create_model", {"session_id": "{session}", "model_seq_id": -1, "base_model": "made/pairs"}),
        ("create_model", {"session_id": "{session}"}),
        ("asample", {"sampling_session_id": "x", "seq_id": 0, "prompt": "text"}),
        ("optim_step", {"model_id": "{model}"}),
        ("retrieve_future", {}),
        ("load_weights", {"path": "tinker://a:train:0/weights/x"}),
        ("create_session", []),
    ],
)
def test_json_that_lacks_something_or_has_it_wrong_is_refused(ask, route, sent):
    session, model = ask.model(seed=1)
    text = json.dumps(sent).replace("{session}", session).replace("{model}", model)
    status, answer = ask(route, text.encode())
    assert status == 400
    assert "\n" not in answer["detail"]


def test_a_model_that_is_not_served_is_refused_with_those_that_are(ask):
    session = ask("create_session", {"tags": []})[1]["session_id"]
    wanted = {"session_id": session, "model_seq_id": 0, "base_model": "other/model"}
    assert "made/pairs" in ask.result(ask("create_model", wanted)[1]["request_id"])["error"]
    wanted = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "other/model"}
    status, answer = ask("create_sampling_session", wanted)
    assert (status, "made/pairs" in answer["detail"]) == (404, True)
    assert ask("get_info", {"model_id": f"{session}:train:0"})[0] in (404, 410)
    assert ask.step("nobody:train:0", 1)[0] == 404
    assert ask("session_heartbeat", {"session_id": "nobody"})[0] == 404


@pytest.mark.parametrize(
    ("route", "words"),
    [
        ("retrieve_futures", "retrieve_future for each"),
        ("join_sampling_session", "random place"),
        ("create_custom_loss", "forward_backward_custom"),
        ("sessions/search", "POST /api/v1/sessions/search"),
        ("no/such/thing", "does not answer"),
    ],
)
def test_a_route_that_is_not_here_is_refused_with_what_to_do_instead(ask, route, words):
    status, answer = ask(route, {"sampling_session_id": "x"})
    assert (status, words in answer["detail"]) == (404, True)
    assert "\n" not in answer["detail"]


def test_another_optimizer_is_refused(ask):
    _, model = ask.model(seed=1)
    sent = {"model_id": model, "seq_id": 1, "optimizer_params": {"type": "dimuon", "learning_rate": 1}}
    assert "AdamW" in ask.result(ask("optim_step", sent)[1]["request_id"])["error"]


def test_a_step_that_would_not_be_finite_is_refused_and_changes_nothing(ask):
    _, model = ask.model(seed=1)
    before = loss_of(ask.result(ask.pass_over(model, 1, [[1, 2]])[1]["request_id"]))
    data = [([1], {"target_tokens": [2], "weights": np.float32([np.nan])})]
    ask.result(ask("forward_backward", a_pass(model, 2, data))[1]["request_id"])
    assert "not finite" in ask.result(ask.step(model, 3)[1]["request_id"])["error"]
    after = ask.result(ask.pass_over(model, 4, [[1, 2]], forward_only=True)[1]["request_id"])
    assert loss_of(after) == before


def test_logits_that_are_not_finite_fail_the_request_that_had_them_alone(ask, made):
    made.table[7] = np.nan
    session = ask("create_session", {"tags": []})[1]["session_id"]
    wanted = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "made/pairs"}
    sampler = ask("create_sampling_session", wanted)[1]["sampling_session_id"]
    made.gate.clear()
    promised = []
    for seq, token in enumerate((7, 1)):
        asked = {"sampling_session_id": sampler, "seq_id": seq, "prompt": {"chunks": [{"tokens": [token]}]}}
        asked["sampling_params"] = {"max_tokens": 3, "temperature": 0, "stop": []}
        promised.append(ask("asample", asked)[1]["request_id"])
    made.gate.set()
    ill, well = map(ask.result, promised)
    assert ill == {"error": "the logits are not finite; check the weights", "category": "user"}
    assert isinstance(well, bytes)


@pytest.mark.parametrize(
    "address",
    [
        "tinker://a:train:0/weights/../../x",
        "tinker://a:train:0/weights/..",
        "tinker://../weights/x",
        "tinker://a:train:0/weights//etc",
        "tinker://a:train:0/other/x",
        "tinker://a:train:0/weights/.hidden",
        "tinker://a:train:0/weights/a\0b",
        "tinker://a:train:0/weights/a/b",
        "file:///etc/passwd",
        "/etc/passwd",
        "",
        None,
    ],
)
def test_no_path_of_a_checkpoint_leads_out_of_its_folder(ask, address):
    with pytest.raises(ValueError, match="no path of a checkpoint"):
        Name.of(address)
    assert ask("weights_info", {"tinker_path": address})[0] == 400
    session, model = ask.model(seed=1)
    if address is not None:
        sent = {"model_id": model, "seq_id": 1, "path": address.rpartition("weights/")[2] or "/x"}
        found = ask.result(ask("save_weights", sent)[1]["request_id"])
        assert "error" in found or found["path"].startswith(f"tinker://{model}/weights/")
        wanted = {"session_id": session, "model_seq_id": 1, "path": address}
        status, answer = ask("load_weights", wanted)
        assert status == 400 or "error" in ask.result(answer["request_id"])


def test_a_name_that_is_taken_is_refused_unless_it_is_to_be_overwritten(ask):
    _, model = ask.model(seed=1)
    save = {"model_id": model, "path": "a"}
    first = ask.result(ask("save_weights", {**save, "seq_id": 1})[1]["request_id"])
    assert first["path"] == f"tinker://{model}/weights/a"
    assert "overwrite" in ask.result(ask("save_weights", {**save, "seq_id": 2})[1]["request_id"])["error"]
    again = ask.result(ask("save_weights", {**save, "seq_id": 3, "overwrite": True})[1]["request_id"])
    assert again == first


def test_a_disk_that_is_full_fails_a_checkpoint_and_leaves_no_part_of_it(ask, server, monkeypatch):
    from made_model import PairLearner

    _, model = ask.model(seed=1)

    def full(self, folder):
        folder.mkdir(parents=True)
        (folder / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(PairLearner, "save", full)
        found = ask.result(ask("save_weights", {"model_id": model, "seq_id": 1, "path": "a"})[1]["request_id"])
        stepped = ask.result(ask.step(model, 2)[1]["request_id"])  # its state cannot be written, which is no error
    assert found["category"] == "server"
    assert "No space left on device" in found["error"]
    assert "metrics" in stepped
    assert ask("checkpoints")[1]["checkpoints"] == []
    assert [p for p in server.service.checkpoints.folder.rglob("*") if p.is_file()] == []
    again = ask.result(ask("save_weights", {"model_id": model, "seq_id": 3, "path": "a"})[1]["request_id"])
    assert again["path"].endswith("/weights/a")


def test_checkpoints_are_listed_described_published_dated_and_deleted(ask):
    session, model = ask.model(seed=1)
    path = ask.result(ask("save_weights", {"model_id": model, "seq_id": 1, "path": "a"})[1]["request_id"])["path"]
    sent = {"model_id": model, "seq_id": 2, "path": "b", "ttl_seconds": 3600}
    ask.result(ask("save_weights_for_sampler", sent)[1]["request_id"])
    listed = ask(f"training_runs/{model}/checkpoints")[1]["checkpoints"]
    assert [c["checkpoint_id"] for c in listed] == ["weights/a", "sampler_weights/b"]
    assert listed[0]["size_bytes"] > 0
    assert listed[1]["expires_at"] is not None
    info = ask("weights_info", {"tinker_path": path})[1]
    assert (info["base_model"], info["lora_rank"], info["train_unembed"]) == ("made/pairs", 4, True)
    copy = ask("copy_weights", {"source_path": path})[1]["tinker_path"]
    assert copy != path
    assert ask("weights_info", {"tinker_path": copy})[1] == info
    assert ask("copy_weights", {"source_path": f"{path}b"})[0] == 404
    assert ask("training_runs/{}/checkpoints/weights/a".format(copy.split("/")[2]), method="DELETE")[0] == 204
    at = f"training_runs/{model}/checkpoints/weights/a"
    assert ask(f"{at}/publish", b"")[0] == 204
    assert ask("checkpoints")[1]["checkpoints"][1]["public"] is True
    assert ask(f"{at}/ttl", {"ttl_seconds": 60}, method="PUT")[0] == 204
    assert ask("training_runs")[1]["training_runs"][0]["last_checkpoint"]["expires_at"] is not None
    assert ask(at, method="DELETE")[0] == 204
    assert ask(at, method="DELETE")[0] == 404
    assert ask("weights_info", {"tinker_path": path})[0] == 404
    assert ask(f"training_runs/{model}")[1]["last_checkpoint"] is None
    assert ask("sessions")[1]["sessions"] == [session]


# ---- strangers


def test_a_server_with_a_key_answers_only_those_who_send_it(made, tmp_path):
    with running([made], tmp_path / "keyed", key="tml-secret-key") as server:
        for key in (None, "tml-wrong", "", "tml-secret-ke"):
            status, answer = Asking(server.url, key)("create_session", {"tags": []})
            assert (status, "API key" in answer["detail"]) == (401, True)
            assert "secret" not in answer["detail"]
        assert Asking(server.url, "tml-secret-key")("create_session", {"tags": []})[0] == 200
        assert Asking(server.url)("healthz", authorization="Bearer tml-secret-key")[0] == 200


def test_a_page_in_a_browser_and_another_name_for_this_machine_are_refused(ask):
    assert ask("create_session", {"tags": []}, origin="https://elsewhere.example")[0] == 403
    assert ask("create_session", {"tags": []}, host="elsewhere.example")[0] == 400
    assert ask("create_session", {"tags": []}, origin="http://localhost:3000")[0] == 200


def test_another_address_than_this_machines_demands_a_key(monkeypatch, capsys):
    monkeypatch.delenv("TEXTPOLICY_API_KEY", raising=False)
    assert main(["serve", "smollm2-135m", "--host", "0.0.0.0"]) == 2
    assert "--api-key" in capsys.readouterr().err


def test_the_messages_are_those_of_the_sdk():
    theirs = pytest.importorskip("tinker.proto.tinker_public_pb2", reason="they are compared with the SDK's")
    from google.protobuf.descriptor_pb2 import FileDescriptorProto

    file = FileDescriptorProto()
    theirs.DESCRIPTOR.CopyToProto(file)
    sdk = {message.name: message for message in file.message_type}
    ours = messages.file_descriptor()
    assert [message.name for message in ours.message_type if message != sdk[message.name]] == []
    assert list(ours.enum_type) == list(file.enum_type)
    assert {*sdk} - {message.name for message in ours.message_type} == {"SamplingParams", "StopStrings", "StopTokens"}
