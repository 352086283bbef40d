"""The Engine over a Tinker server: it samples and trains there, and sends what the local engine would compute."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np

from .._system.files import read_object, write_whole
from ..engine import Sampling, stop_tokens
from ..errors import ServiceError, TextPolicyError, UserError, refuse_outside, unknown_name
from ..losses import Surrogate, policy_objective, tokens_of
from ..types import Batch, Completion, token_ids
from .datum import DatumArrays, datum_arrays
from .loss import tinker_loss
from .service import Service, sdk

Reduction = Literal[
    "sum",  # over tokens and data: hosted Tinker
    "mean",  # over the positions of a datum, then over data: SkyRL's JAX engine
]


@dataclass(frozen=True, slots=True)
class Adam:
    """The server's AdamW. Gradients longer than ``max_grad_norm`` are scaled down to it; 0 turns that off.

    A server of the reduction "mean" ignores ``max_grad_norm``.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0


KEPT = "server.json"  # in a checkpoint: the path on the server


class TinkerEngine:
    """Sample from and train one LoRA on a Tinker server; made by ``connect``.

    Log-probs are float32 of the model at temperature 1, whatever the temperature of sampling: that is
    what the service returns, and trains on. So training requires temperature 1, unless ``untempered`` accepts
    the ratio of the untempered policies. There is no entropy, only the surprisal of the sampled token.
    Weights are multiplied into the advantages sent, so that the server's sum is the batch's
    aggregate; for a server that averages, ``reduction`` "mean", each datum is scaled up to cancel its average.
    A new sampler is made after every update, and only the newest one is used.
    """

    packages: tuple[str, ...] = ("tinker",)

    def __init__(
        self,
        service: Service,
        trainer: Any,
        model: str,
        *,
        stop: Sequence[int] = (),
        rank: int = 32,
        adam: Adam | None = None,
        reduction: Reduction = "sum",
        untempered: bool = False,
    ):
        """The ``trainer`` is the SDK's training client; an empty ``stop`` means those of the tokenizer."""
        if reduction not in get_args(Reduction):
            raise unknown_name("reduction", reduction, get_args(Reduction))
        self.service, self.model, self.rank = service, model, rank
        self.adam = adam or Adam()
        self.reduction, self.untempered = reduction, untempered
        self._trainer = trainer
        self._sampler: Any = None  # of the current weights; None once they have changed
        self._base: Any = None  # samples from the frozen reference
        self._saved = 0
        with service.telling(f"loading the tokenizer of {model}"):
            self.tokenizer: Any = trainer.get_tokenizer()
        self.stop = token_ids(sorted(stop or stop_tokens(self.tokenizer)))

    @classmethod
    def connect(
        cls,
        model: str,
        *,
        stop: Sequence[int] = (),
        rank: int = 32,
        seed: int = 0,
        base_url: str | None = None,
        resume: str | None = None,
        adam: Adam | None = None,
        reduction: Reduction = "sum",
        untempered: bool = False,
        patience: float = 120.0,
    ) -> Self:
        """Make a fresh LoRA of ``rank`` on ``model``, or load the state at ``resume``, optimiser included.

        ``base_url`` None means TINKER_BASE_URL, or else the hosted service. A server that has not answered
        for ``patience`` seconds counts as gone. Raises UserError, ServiceError and MissingDependencyError.
        """
        service = Service(base_url, patience=patience)
        try:
            service.refuse_unknown_model(model)
            client = service.client
            if resume is None:
                doing = f"making a LoRA of rank {rank} on {model}"
                trainer = service.call(doing, client.create_lora_training_client, model, rank=rank, seed=seed)
            else:
                resumed = client.create_training_client_from_state_with_optimizer
                trainer = service.call(f"resuming {resume}", resumed, resume)
            return cls(
                service, trainer, model, stop=stop, rank=rank, adam=adam, reduction=reduction, untempered=untempered
            )
        except TextPolicyError:
            service.close("errored")
            raise

    # ---- the Engine protocol

    def sample(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling) -> list[list[Completion]]:
        """Return ``n`` completions for every prompt (token ids), in prompt order; all requests are sent before any
        answer is awaited.

        Raises UserError for a sampling setting that the service lacks, and ServiceError.
        """
        refuse_outside("n", n, 1, whole=True)
        if any(len(p) == 0 for p in prompts):
            raise UserError("a prompt has no tokens; give every prompt at least one")
        prompts = [token_ids(p).tolist() for p in prompts]  # the server alone knows how many tokens its model has
        lacking = (("min_p", sampling.min_p, 0), ("repetition_penalty", sampling.repetition_penalty, 1))
        for name, value, off in lacking:
            if value != off:
                raise UserError(
                    f"{name} is {value}, which the Tinker service does not support; leave it at {off}, or use "
                    "--engine mlx"
                )
        if self._sampler is None:
            made = self._trainer.save_weights_and_get_sampling_client
            self._sampler = self.service.call("handing the weights to the sampler", made)
        types = sdk().types
        settings = {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "stop": self.stop.tolist(),
        }
        with self.service.telling("sampling"):
            pending = []
            for i, p in enumerate(prompts):
                seed = int(np.random.SeedSequence([sampling.seed, i]).generate_state(1)[0]) >> 1  # 31 bits
                params = sdk().SamplingParams(**settings, seed=seed)
                pending.append(self._sampler.sample(types.ModelInput.from_ints(p), n, params))
        answers = [self.service.wait(future, "sampling") for future in pending]
        temperature = 1.0 if self.untempered and sampling.temperature else sampling.scored_temperature
        return [[_completion(s, temperature) for s in answer.sequences] for answer in answers]

    def score(self, batch: Batch, *, reference: bool = False) -> np.ndarray:
        """Return the (B, T) float32 log-probs of the batch's sampled targets at temperature 1, 0 elsewhere.

        They come from a forward pass of the trainer, or with ``reference`` from the model without its LoRA.
        """
        self._refuse_tempered(batch)
        rows = datum_arrays(batch)
        if not rows:
            return np.zeros(batch.targets.shape, np.float32)
        if not reference:
            data = [_wire(d, {"target_tokens": d.target_tokens, "weights": d.mask}) for d in rows]
            output = self.service.call("scoring", self._trainer.forward, data, "cross_entropy")
            return _spread(batch, rows, [_array(o["logprobs"]) for o in output.loss_fn_outputs])
        doing = "scoring under the reference"
        if self._base is None:
            self._base = self.service.call(doing, self.service.client.create_sampling_client, base_model=self.model)
        whole, types = [[*d.model_input.tolist(), int(d.target_tokens[-1])] for d in rows], sdk().types  # N + 1 tokens
        with self.service.telling(doing):
            pending = [self._base.compute_logprobs(types.ModelInput.from_ints(tokens)) for tokens in whole]
        found = [self.service.wait(future, doing) for future in pending]
        # the first token has no log-prob, and some servers leave it out
        kept = [np.array(l[len(l) - len(d.target_tokens) :], np.float32) for l, d in zip(found, rows, strict=True)]
        return _spread(batch, rows, kept)

    def update(self, batch: Batch, surrogate: Surrogate, learning_rate: float) -> Mapping[str, float]:
        """Take one optimiser step on ``batch``; rows whose advantages are all 0 are not sent.

        Both calls are queued before either is awaited. If no row is left nothing changes, and
        ``updated`` is 0. Raises UserError for a surrogate that the service has no loss for, and ServiceError.
        """
        loss = tinker_loss(surrogate)
        self._refuse_tempered(batch)
        live = np.flatnonzero(((batch.weights != 0) & (batch.advantages != 0)).any(axis=1))
        if len(live) == 0:
            return {"loss": 0.0, "grad_norm": 0.0, "updated": 0.0}
        rows = batch.take(live)
        if surrogate.ratio == "sequence":  # the service's is GSPO-token's: GSPO's only where A is one per completion
            trained = rows.weights != 0
            highest = np.where(trained, rows.advantages, -np.inf).max(axis=1)
            lowest = np.where(trained, rows.advantages, np.inf).min(axis=1)
            if (highest > lowest).any():
                raise UserError(
                    "algorithm.ratio is sequence but advantages differ from token to token, which the Tinker service "
                    "does not support; set algorithm.ratio to sequence-token, or use --engine mlx"
                )
        sent, data = self.data(rows), []
        for d in sent:
            arrays = {"logprobs": d.logprobs, "advantages": d.advantages}
            if loss.masked:
                arrays["sequence_ratio_mask"] = d.mask
            sent_with = {"weights": d.advantages} if loss.weighted else arrays
            data.append(_wire(d, {"target_tokens": d.target_tokens, **sent_with}))
        a = self.adam
        adam = sdk().AdamParams(
            learning_rate=learning_rate,
            beta1=a.beta1,
            beta2=a.beta2,
            eps=a.eps,
            weight_decay=a.weight_decay,
            grad_clip_norm=a.max_grad_norm,
        )
        with self.service.telling("the update"):
            passed = self._trainer.forward_backward(data, loss.name, loss.config)
            stepped = self._trainer.optim_step(adam)
        self._sampler = None
        output = self.service.wait(passed, "the forward and backward pass")
        step = self.service.wait(stepped, "the optimiser step")
        l = _spread(rows, sent, [_array(o["logprobs"]) for o in output.loss_fn_outputs])
        return {**_gradient(step.metrics or {}), **_measured(l, rows, surrogate)}

    def save(self, path: Path) -> None:
        """Save the LoRA on the server, and write its paths there to ``path``/tinker.json, atomically.

        "state" is what ``connect`` resumes, "sampler" the weights alone, which other clients can sample from.
        """
        name = self._name("adapter")
        sampler = str(self.service.call("saving the adapter", self._trainer.save_weights_for_sampler, name).path)
        kept = {"model": self.model, "rank": self.rank, "state": self.save_state(name), "sampler": sampler}
        path.mkdir(parents=True, exist_ok=True)
        write_whole(path / "tinker.json", json.dumps(kept, indent=2) + "\n")

    # ---- states on the server

    def save_state(self, name: str) -> str:
        """Save weights and optimiser on the server under ``name`` (letters, digits, _ and -); return the path there.

        The SDK repeats a save whose answer was lost, and the server then finds the name taken: another one is used.
        """

        def save(name: str) -> str:
            return str(self.service.call(f"saving the state {name}", self._trainer.save_state, name).path)

        try:
            return save(name)
        except ServiceError as error:
            if not isinstance(error.__cause__, sdk().ConflictError):
                raise
            return save(self._name(f"{name}-again"))

    def weights(self) -> str:
        """Save the trainable parameters on the server, for the best of a run; return the path there."""
        return self.save_state(self._name("kept"))

    def restore(self, weights: str) -> None:
        """Load what ``weights`` returned, with a fresh optimiser."""
        load = self.service.client.create_training_client_from_state
        self._trainer, self._sampler = self.service.call(f"restoring {weights}", load, weights), None

    def close(self, status: str = "success") -> None:
        """End the session, which frees what it holds on the server: "success", "errored" or "interrupted"."""
        self.service.close(status)

    # ---- checkpoints of a run, which hold paths on the server

    def write_weights(self, weights: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / KEPT).write_text(json.dumps({"path": weights}) + "\n", encoding="utf-8")

    def read_weights(self, folder: Path) -> str:
        path, advice = folder / KEPT, f"remove {folder}"
        if not isinstance(weights := (read_object(path, advice) or {}).get("path"), str):
            raise UserError(f"{path} has no path of a state on the server; {advice}")
        return weights

    def write_state(self, folder: Path) -> None:
        """Save weights and optimiser on the server. Raises ServiceError and OSError."""
        self.write_weights(self.save_state(self._name("step")), folder)

    def read_state(self, folder: Path) -> None:
        """Load weights and optimiser as ``write_state`` saved them. Raises UserError, ServiceError."""
        path = self.read_weights(folder)
        load = self.service.client.create_training_client_from_state_with_optimizer
        self._trainer, self._sampler = self.service.call(f"resuming {path}", load, path), None

    @property
    def platform(self) -> dict[str, str]:
        """The model that is trained; the server does not report its hardware."""
        return {"device": f"Tinker service, {self.model}"}

    # ---- what is sent

    def data(self, batch: Batch) -> list[DatumArrays]:
        """Return what one update sends: the rows of ``batch`` with advantages that carry its weights.

        The server's reduction of -J(r, A w) is then sum_t w_t (-J(r_t, A_t)): every objective is
        homogeneous in A. "mean" divides by N, a datum's positions, and by their number B, so A is multiplied by N B.
        """
        rows = datum_arrays(replace(batch, advantages=batch.advantages * batch.weights))
        if self.reduction == "sum":
            return rows
        scales = [np.float32(len(d.target_tokens) * len(rows)) for d in rows]
        return [replace(d, advantages=d.advantages * scale) for d, scale in zip(rows, scales, strict=True)]

    # ---- private

    def _refuse_tempered(self, batch: Batch) -> None:
        other = np.unique(batch.temperatures[batch.temperatures != 1])
        if len(other):
            raise UserError(
                f"completions were sampled at temperature {other[0]:g} and the Tinker service scores at 1; set "
                "rollout.temperature to 1, or tinker.untempered to train on the untempered ratio"
            )

    def _name(self, what: str) -> str:
        self._saved += 1
        return f"{what}-{self._saved}"


# ---- to and from the wire


def _wire(d: DatumArrays, arrays: Mapping[str, np.ndarray]) -> Any:
    """Make the SDK's datum; checks the arrays, because servers accept short or infinite ones silently."""
    types = sdk().types
    for name, array in arrays.items():
        if array.shape != d.model_input.shape or not np.isfinite(array).all():
            raise UserError(f"{name} of a datum has shape {array.shape} or is not finite; fix the batch")
    return types.Datum(
        model_input=types.ModelInput.from_ints(d.model_input.tolist()),
        loss_fn_inputs={name: types.TensorData.from_numpy(array) for name, array in arrays.items()},
    )


def _array(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.to_numpy(), np.float32)


def _completion(sequence: Any, temperature: float | None) -> Completion:
    """Read one sampled sequence of the SDK. Raises ServiceError for unusable log-probs."""
    tokens = np.asarray(sequence.tokens_np, np.int32)
    logprobs = np.asarray([] if sequence.logprobs_np is None else sequence.logprobs_np, np.float32)
    if tokens.shape != logprobs.shape or not np.isfinite(logprobs).all():
        raise ServiceError(
            f"the server returned {len(logprobs)} log-probs for {len(tokens)} tokens, or some that are not finite; "
            "check its log, and resume from the last checkpoint"
        )
    return Completion(tokens, logprobs, None, sequence.stop_reason == "length", temperature)


def _spread(batch: Batch, rows: Sequence[DatumArrays], values: Sequence[np.ndarray]) -> np.ndarray:
    """Return (B, T) float32 from one array per datum, 0 where nothing was sampled."""
    out = np.zeros(batch.targets.shape, np.float32)
    for d, value in zip(rows, values, strict=True):
        out[d.row, : len(d.mask)] = np.where(d.mask != 0, value[: len(d.mask)], 0)
    return out


def _measured(l: np.ndarray, batch: Batch, surrogate: Surrogate) -> dict[str, float]:
    """Return the loss and the gap of the learner's log-probs l to the sampler's, as the local engine reports them."""
    live = batch.weights != 0
    d = np.where(live, l - batch.logprobs, 0).astype(np.float64)
    low, high = surrogate.objective.clipped(tokens_of(l, batch, np, surrogate), np)
    return {
        "loss": float(policy_objective(l, batch, np, surrogate)),
        "logprob_gap_max": float(np.abs(d).max()),
        "logprob_gap_mean": float(np.abs(d)[live].mean()),
        "sampler_kl": float((np.exp(np.clip(d, -20, 20)) - 1 - d)[live].mean()),
        "clip_fraction_low": float((live & low)[live].mean()),
        "clip_fraction_high": float((live & high)[live].mean()),
    }


def _gradient(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the gradient norm if the server reports one, under any prefix; without it the step counts as an update."""
    norms = [value for name, value in metrics.items() if name.partition(":")[0].endswith("grad_norm")]
    return {"grad_norm": float(norms[0]), "updated": float(norms[0] > 0)} if norms else {"updated": 1.0}
