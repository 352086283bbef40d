"""Carry out what clients ask of their models, in each model's order, and keep the models' states on disk.

A state is written after a step of the optimiser, together with its place in the order; requests after it are
repeated from the journal when the model is needed again, after a restart or a long rest.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ServiceError, UserError
from ..serving import Adam, Adapter, Learner, Model, Passed, Weights
from . import messages, requests
from .checkpoints import About, Checkpoints, Name
from .registry import REPLAYED, Job, Outcome, Registry, Sampler, Tenant
from .runs import Runs

SHARE = 0.05  # of the time, for writing states
STABLE = "stable_reinforce"


class Training:
    """The models that clients train, on the bases ``models``; one thread calls it."""

    def __init__(self, models: Mapping[str, Model], registry: Registry, checkpoints: Checkpoints, folder: Path) -> None:
        self.models, self.registry, self.checkpoints = models, registry, checkpoints
        self.states, self.snapshots = folder / "states", folder / "snapshots"
        self.runs = Runs(folder / "runs", models)

    def base(self, name: str) -> Model:
        """Return a base model. Raises UserError for one that is not served."""
        if name not in self.models:
            served = ", ".join(self.models)
            raise UserError(
                f"this server does not serve {name!r}; ask for one of {served}, or start it with that model"
            )
        return self.models[name]

    def run(self, tenant: Tenant, job: Job) -> None:
        """Carry out a request, the next in its model's order, and write its end.

        Raises what the model raises, with the request not ended.
        """
        tenant.used = time.time()
        if job.seq:
            self.wake(tenant)
        body, protobuf = self._carry_out(tenant, job)
        self.end(tenant, job, Outcome("done", body, protobuf))
        if job.kind in ("optim_step", "load_weights"):
            self.keep(tenant, now=job.kind == "load_weights")  # a checkpoint may be gone when it would be replayed

    def end(self, tenant: Tenant, job: Job, outcome: Outcome) -> None:
        """Write the end of a request and go on to the next."""
        del tenant.waiting[job.seq]
        tenant.done = job.seq
        if job.seq == 0 and outcome.status != "done":
            tenant.lost = "it could not be made"
            self.registry.finish(job, outcome)
        else:
            self.registry.finish(job, outcome, self.registry.save_tenant(tenant))

    def _carry_out(self, tenant: Tenant, job: Job) -> tuple[bytes, bool]:
        """Do what a request asks for and return its answer, and whether that is protobuf."""
        assert job.payload is not None
        learner, answer = tenant.learner, {}
        match job.kind:
            case "create_model":
                answer = self._create(tenant, requests.read_json(requests.CreateModel, job.payload))
            case "load_weights" if job.seq == 0:
                answer = self._create_from(tenant, requests.read_json(requests.LoadWeights, job.payload))
            case "forward_backward":
                assert learner is not None
                asked_of, passed = self._pass(tenant, learner, job.payload)
                if asked_of.backward:
                    self.runs.passed(tenant, asked_of, passed)
                return messages.write_passed(passed), True
            case "optim_step":
                assert learner is not None
                metrics = self._step(tenant, learner, job.payload)
                tenant.steps += 1
                self.runs.stepped(tenant, metrics)
                answer = {"metrics": dict(metrics), "type": "optim_step"}
            case "load_weights":
                assert learner is not None
                asked = requests.read_json(requests.LoadWeights, job.payload)
                self._load(tenant, learner, asked)
                answer = {"path": asked.path, "type": "load_weights"}
            case "save_weights":
                assert learner is not None
                path = self._save(tenant, job, requests.read_json(requests.SaveWeights, job.payload), "weights")
                answer = {"path": path, "type": "save_weights"}
            case "save_weights_for_sampler":
                answer = self._save_for_sampler(tenant, job)
            case _:
                raise UserError(f"this server does not do {job.kind}; download the checkpoint's folder instead")
        return json.dumps(answer).encode(), False

    # ---- what changes a model, now or in a replay

    def wake(self, tenant: Tenant) -> None:
        """Bring a model into memory as it is after its last request. Raises UserError if that cannot be."""
        if tenant.learner is not None:
            return
        base = self.base(tenant.base)
        learner = (
            base.learner(tenant.adapter) if tenant.state is None else base.loaded(Path(tenant.state), optimizer=True)
        )
        marks = ", ".join("?" * len(REPLAYED))
        rows = self.registry.journal.read(
            "SELECT kind, payload FROM jobs WHERE owner = ? AND seq > ? AND seq <= ? AND status = 'done' "
            f"AND seq > 0 AND kind IN ({marks}) ORDER BY seq",
            *(tenant.id, tenant.state_seq, tenant.done, *REPLAYED),
        )
        tenant.settled = True
        for row in rows:
            match row["kind"]:
                case "forward_backward":
                    self._pass(tenant, learner, row["payload"])
                case "optim_step":
                    self._step(tenant, learner, row["payload"])
                case "load_weights":
                    self._load(tenant, learner, requests.read_json(requests.LoadWeights, row["payload"]))
        tenant.learner = learner

    def newest(self, tenant: Tenant) -> Weights:
        """Return a model's weights as they are now. Raises UserError."""
        self.wake(tenant)
        assert tenant.learner is not None
        return tenant.learner.weights()

    def _create(self, tenant: Tenant, asked: requests.CreateModel) -> dict[str, Any]:
        """Make a new adapter."""
        _refuse_optimizer(asked.optimizer_config)
        config = asked.lora_config or requests.LoraConfig()
        tenant.base, tenant.about = asked.base_model, asked.user_metadata
        tenant.adapter = Adapter(config.rank, config.seed, config.train_mlp, config.train_attn, config.train_unembed)
        tenant.learner = self.base(asked.base_model).learner(tenant.adapter)
        return {"model_id": tenant.id, "type": "create_model"}

    def _create_from(self, tenant: Tenant, asked: requests.LoadWeights) -> dict[str, Any]:
        """Make the model that a checkpoint holds."""
        _refuse_optimizer(asked.optimizer_config)
        path, about = self.checkpoints.found(asked.path)
        tenant.base, tenant.about = asked.base_model or about.base, asked.user_metadata
        tenant.adapter = Adapter(**about.adapter)
        tenant.learner = self.base(tenant.base).loaded(path, optimizer=asked.optimizer)
        self._write_state(tenant, 0)
        return {"path": asked.path, "model_id": tenant.id, "type": "load_weights"}

    def _pass(self, tenant: Tenant, learner: Learner, payload: bytes) -> tuple[messages.Pass, Passed]:
        asked = messages.read_pass(messages.parsed_pass(payload))
        if asked.loss == STABLE:
            raise UserError(
                f"{STABLE} is not published, so that this server cannot compute it; pass loss_fn='importance_sampling'"
            )
        vocabulary = self.base(tenant.base).vocabulary
        for i, datum in enumerate(asked.data):
            wrong = datum.tokens[(datum.tokens < 0) | (datum.tokens >= vocabulary)]
            if wrong.size:
                raise UserError(
                    f"datum {i} has the token {wrong[0]}, and {tenant.base} has the ids 0 to {vocabulary - 1}; use the "
                    "tokenizer that belongs to the model"
                )
        passed = learner.passed(asked.data, asked.loss, asked.config, backward=asked.backward)
        tenant.settled = tenant.settled and not asked.backward
        return asked, passed

    def _step(self, tenant: Tenant, learner: Learner, payload: bytes) -> Mapping[str, float]:
        asked = requests.read_json(requests.OptimStep, payload)
        _refuse_optimizer(asked.optimizer_params)
        a = asked.adam_params
        clip = max(a.grad_clip_norm, 0.0)
        metrics = learner.step(Adam(a.learning_rate, a.beta1, a.beta2, a.eps, a.weight_decay, clip))
        tenant.settled = True
        return metrics

    def _load(self, tenant: Tenant, learner: Learner, asked: requests.LoadWeights) -> None:
        path, about = self.checkpoints.found(asked.path)
        if self.models.get(about.base) is not self.models.get(tenant.base):
            raise UserError(
                f"{asked.path} belongs to {about.base}, and this model to {tenant.base}; load one of its own"
            )
        learner.load(path, optimizer=asked.optimizer)
        tenant.settled = True

    # ---- what is written to disk

    def _save(self, tenant: Tenant, job: Job, asked: requests.SaveWeights, kind: str) -> str:
        """Write a checkpoint and return its path."""
        assert tenant.learner is not None
        name = Name.of(f"tinker://{tenant.id}/{kind}/{asked.path or f'{job.seq:06d}'}")
        now = time.time()
        about = About(
            tenant.base, tenant.adapter.rank, asdict(tenant.adapter), now, job.id,
            None if asked.ttl_seconds is None else now + asked.ttl_seconds, asked.user_metadata,
        )  # fmt: skip
        fill = tenant.learner.save if kind == "weights" else tenant.learner.weights().save
        self.checkpoints.write(name, about, fill, overwrite=asked.overwrite)
        return str(name)

    def _save_for_sampler(self, tenant: Tenant, job: Job) -> dict[str, Any]:
        """Write a checkpoint for sampling, or a snapshot that only its sampler knows."""
        assert tenant.learner is not None
        assert job.payload is not None
        asked = requests.read_json(requests.SaveForSampler, job.payload)
        kind = {"type": "save_weights_for_sampler"}
        if asked.path is not None or asked.sampling_session_seq_id is None:
            return {"path": self._save(tenant, job, asked, "sampler_weights"), **kind}
        name = sampler_id(tenant.session, asked.sampling_session_seq_id)
        folder = self.snapshots / name.replace(":", "-")
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)  # of a server that was killed
        tenant.learner.weights().save(folder)
        follows = tenant.id if asked.kind == "inflight" else None
        self.registry.add_sampler(Sampler(name, tenant.session, tenant.base, None, str(folder), follows))
        return {"sampling_session_id": name, **kind}

    def keep(self, tenant: Tenant, *, now: bool = False) -> None:
        """Write a model's state if that takes no more than its share of the time, or ``now``.

        A disk that refuses is no error: the requests since the last state stay in the journal.
        """
        begun = time.monotonic()
        if not now and begun - tenant.kept_at < tenant.keep_cost / SHARE:
            return
        try:
            self._write_state(tenant, tenant.done)
        except (OSError, ServiceError):
            return
        tenant.kept_at = time.monotonic()
        tenant.keep_cost = tenant.kept_at - begun

    def _write_state(self, tenant: Tenant, seq: int) -> None:
        """Write a model's state after request ``seq``, and drop what is thereby not needed. Raises OSError."""
        assert tenant.learner is not None
        above = self.states / tenant.id.replace(":", "-")
        above.mkdir(parents=True, exist_ok=True)
        folder = above / f"{seq:09d}"
        shutil.rmtree(folder, ignore_errors=True)
        tenant.learner.save(folder)
        before = tenant.state, tenant.state_seq
        tenant.state, tenant.state_seq = str(folder), seq
        payloads = (
            "UPDATE jobs SET payload = NULL WHERE owner = ? AND seq <= ? AND status != 'waiting'",
            (tenant.id, seq),
        )
        try:
            self.registry.journal.write(self.registry.save_tenant(tenant), payloads).result()
        except ServiceError:
            tenant.state, tenant.state_seq = before
            raise
        for stale in above.iterdir():
            if stale != folder:
                shutil.rmtree(stale, ignore_errors=True)

    def rest(self, tenant: Tenant) -> None:
        """Take a model out of memory; it comes back with its next request."""
        if tenant.learner is not None:
            if tenant.settled and tenant.done > tenant.state_seq:
                self.keep(tenant, now=True)
            tenant.learner.close()
            tenant.learner = None

    def drop(self, tenant: Tenant) -> None:
        """Forget a model whose session has ended; its checkpoints stay."""
        if tenant.learner is not None:
            tenant.learner.close()
        tenant.learner = tenant.state = None
        self.runs.ended(tenant)
        shutil.rmtree(self.states / tenant.id.replace(":", "-"), ignore_errors=True)


def sampler_id(session: str, number: int) -> str:
    """Return the id of a session's sampler."""
    return f"{session}:sample:{number}"


def _refuse_optimizer(family: requests.Family | None) -> None:
    """Raise UserError for an optimiser that is not AdamW."""
    if family is not None and family.type != "adamw":
        raise UserError(f"the optimizer {family.type!r} is not served here; use AdamW, tinker.AdamParams(...)")
