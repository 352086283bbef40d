"""The Engine over a Tinker server: samples and trains there, and sends what the local engine would compute."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np

from ..engine import Sampling
from ..errors import ServiceError, TextPolicyError, UserError, unknown_name
from ..losses import Surrogate, importance_ratio, policy_objective
from ..types import Batch, Completion
from .datum import DatumArrays, datum_arrays
from .loss import TinkerLoss, tinker_loss
from .service import Service, sdk

Reduction = Literal[
    "sum",  # over tokens and data: hosted Tinker
    "mean",  # over the positions of a datum, then over data: SkyRL's JAX engine
]


@dataclass(frozen=True, slots=True)
class Adam:
    """The server's AdamW; a longer gradient than ``max_grad_norm`` is scaled down to it, 0 leaves it alone.

    A server of the reduction "mean" does not clip, whatever it is asked.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0

    def at(self, learning_rate: float) -> Any:
        """As the SDK says it."""
        return sdk().AdamParams(
            learning_rate=learning_rate,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            grad_clip_norm=self.max_grad_norm,
        )


KEPT = "server.json"  # in a checkpoint: the path on the server


class TinkerEngine:
    """Samples from and trains one LoRA on a Tinker server; made by ``connect``.

    Log-probs are float32 of the model at temperature 1, whatever the temperature of sampling: that is
    what the service gives, and trains on. So training asks for temperature 1, unless ``untempered`` says to
    take the ratio of the untempered policies all the same. There is no entropy: the surprisal of the sampled
    token is what is known. Weights are one factor of the advantages sent, so that the server's sum is the batch's
    aggregate; for a server that averages, ``reduction`` "mean", each datum is scaled up to cancel its average.
    A sampler is taken anew after every update, and only the newest one is used.
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
        """``trainer`` is the SDK's training client; () stops at the tokenizer's end of sequence."""
        if reduction not in get_args(Reduction):
            raise unknown_name("reduction", reduction, get_args(Reduction))
        self.service, self.model, self.rank = service, model, rank
        self.adam = adam or Adam()
        self.reduction, self.untempered = reduction, untempered
        self._trainer = trainer
        self._sampler: Any = None  # of the weights as they are now; None once they have moved
        self._base: Any = None  # samples from the frozen reference
        self._saved = 0
        with service.telling(f"loading the tokenizer of {model}"):
            self.tokenizer: Any = trainer.get_tokenizer()
        self.stop = np.array(sorted(stop or _end_of_sequence(self.tokenizer)), np.int32)

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
        """A fresh LoRA of ``rank`` on ``model``, or the one that ``save_state`` called ``resume``, optimiser and all.

        ``base_url`` None takes TINKER_BASE_URL, or else the hosted service. A server that has not answered
        for ``patience`` seconds counts as gone. Raises UserError, ServiceError and MissingDependencyError.
        """
        service = Service(base_url, patience=patience)
        try:
            trainer = _trainer(service, model, rank, seed, resume)
            return cls(
                service, trainer, model, stop=stop, rank=rank, adam=adam, reduction=reduction, untempered=untempered
            )
        except TextPolicyError:
            service.close("errored")
            raise

    # ---- the Engine protocol

    def sample(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling) -> list[list[Completion]]:
        """``n`` completions for every prompt (token ids), in prompt order; all are asked for before any is waited for.

        Raises UserError for a setting of sampling that the service has not, ServiceError.
        """
        _refuse_sampling(prompts, sampling)
        sampler, types = self._newest(), sdk().types
        with self.service.telling("sampling"):
            pending = [
                sampler.sample(types.ModelInput.from_ints(list(map(int, p))), n, self._drawn(sampling, i))
                for i, p in enumerate(prompts)
            ]
        answers = [self.service.wait(future, "sampling") for future in pending]
        return [[_completion(s, sampling, self.untempered) for s in answer.sequences] for answer in answers]

    def score(self, batch: Batch, *, reference: bool = False) -> np.ndarray:
        """(B, T) float32 log-probs of the batch's sampled targets at temperature 1, 0 elsewhere.

        Now, by a forward pass of the trainer, or under the frozen ``reference``, the model without its LoRA.
        """
        self._refuse_tempered(batch)
        rows = datum_arrays(batch)
        if not rows:
            return np.zeros(batch.targets.shape, np.float32)
        return _spread(batch, rows, self._reference(rows) if reference else self._forward(rows))

    def update(self, batch: Batch, surrogate: Surrogate, learning_rate: float) -> Mapping[str, float]:
        """One optimiser step on ``batch``; rows whose advantages are all 0 are not sent.

        Both calls are queued before either is waited for. If no row is left nothing moves, and
        ``updated`` is 0. Raises UserError for a surrogate that the service has no loss for, ServiceError.
        """
        loss = tinker_loss(surrogate)
        self._refuse_tempered(batch)
        live = np.flatnonzero(((batch.weights != 0) & (batch.advantages != 0)).any(axis=1))
        if len(live) == 0:
            return {"loss": 0.0, "grad_norm": 0.0, "updated": 0.0}
        rows = batch.take(live)
        _refuse_uneven(rows, surrogate)
        sent = self.data(rows)
        with self.service.telling("the update"):
            passed = self._trainer.forward_backward([_datum(d, loss) for d in sent], loss.name, loss.config)
            stepped = self._trainer.optim_step(self.adam.at(learning_rate))
        self._sampler = None
        output = self.service.wait(passed, "the forward and backward pass")
        step = self.service.wait(stepped, "the optimiser step")
        l = _spread(rows, sent, [_array(o["logprobs"]) for o in output.loss_fn_outputs])
        return {**_told(step.metrics or {}), **_measured(l, rows, surrogate)}

    def save(self, path: Path) -> None:
        """Keep the LoRA on the server, and write where to the folder ``path``: tinker.json, whole or not at all.

        "state" is what ``connect`` resumes, "sampler" the weights alone, which other clients can sample from.
        """
        name = self._name("adapter")
        with self.service.telling("saving the adapter"):
            pending = self._trainer.save_weights_for_sampler(name)
        sampler = str(self.service.wait(pending, "saving the adapter").path)
        kept = {"model": self.model, "rank": self.rank, "state": self.save_state(name), "sampler": sampler}
        path.mkdir(parents=True, exist_ok=True)
        new = path / "tinker.json.tmp"
        new.write_text(json.dumps(kept, indent=2) + "\n")
        new.replace(path / "tinker.json")

    # ---- what is kept on the server

    def save_state(self, name: str) -> str:
        """Keep weights and optimiser on the server under ``name`` (letters, digits, _ and -); its path there.

        A save whose answer was lost is asked for again, and finds its name taken: then it gets another one.
        """
        try:
            return self._keep(name)
        except ServiceError as error:
            if not isinstance(error.__cause__, sdk().ConflictError):
                raise
            return self._keep(self._name(f"{name}-again"))

    def _keep(self, name: str) -> str:
        with self.service.telling(f"saving the state {name}"):
            pending = self._trainer.save_state(name)
        return str(self.service.wait(pending, f"saving the state {name}").path)

    def weights(self) -> str:
        """Keep what is trained on the server, for the best of a run; its path there."""
        return self.save_state(self._name("kept"))

    def restore(self, weights: str) -> None:
        """Put back what ``weights`` returned, with a fresh optimiser."""
        with self.service.telling(f"restoring {weights}"):
            pending = self.service.client.create_training_client_from_state(weights)
        self._trainer, self._sampler = self.service.wait(pending, f"restoring {weights}"), None

    def close(self, status: str = "success") -> None:
        """End the session on the server, which frees what it holds there: "success", "errored" or "interrupted"."""
        self.service.close(status)

    # ---- checkpoints of a run: what is here are the names of what is kept on the server

    def write_weights(self, weights: str, folder: Path) -> None:
        _write_path(folder, weights)

    def read_weights(self, folder: Path) -> str:
        return _read_path(folder)

    def write_state(self, folder: Path) -> None:
        """Keep weights and optimiser on the server. Raises ServiceError and OSError."""
        _write_path(folder, self.save_state(self._name("step")))

    def read_state(self, folder: Path) -> None:
        """Go on with weights and optimiser as they were kept. Raises UserError, ServiceError."""
        path = _read_path(folder)
        with self.service.telling(f"resuming {path}"):
            pending = self.service.client.create_training_client_from_state_with_optimizer(path)
        self._trainer, self._sampler = self.service.wait(pending, f"resuming {path}"), None

    @property
    def platform(self) -> dict[str, str]:
        """The model it asked for; what the server computes on is its own business."""
        return {"device": f"Tinker service, {self.model}"}

    # ---- what is sent

    def data(self, batch: Batch) -> list[DatumArrays]:
        """What one update sends: the rows of ``batch`` with advantages that carry its weights.

        The server's reduction of -J(r, A w) is then sum_t w_t (-J(r_t, A_t)): every objective is
        homogeneous in A. "mean" divides by N, a datum's positions, and by their number B, so A is multiplied by N B.
        """
        rows = datum_arrays(replace(batch, advantages=batch.advantages * batch.weights))
        if self.reduction == "sum":
            return rows
        scales = [np.float32(len(d.target_tokens) * len(rows)) for d in rows]
        return [replace(d, advantages=d.advantages * scale) for d, scale in zip(rows, scales, strict=True)]

    # ---- private

    def _newest(self) -> Any:
        """A sampler of the weights as they are now."""
        if self._sampler is None:
            with self.service.telling("handing the weights to the sampler"):
                pending = self._trainer.save_weights_and_get_sampling_client()
            self._sampler = self.service.wait(pending, "handing the weights to the sampler")
        return self._sampler

    def _drawn(self, sampling: Sampling, index: int) -> Any:
        """The parameters of prompt ``index``, with a seed of its own."""
        seed = int(np.random.SeedSequence([sampling.seed, index]).generate_state(1)[0]) >> 1  # 31 bits
        return sdk().SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            seed=seed,
            stop=self.stop.tolist(),
        )

    def _forward(self, rows: Sequence[DatumArrays]) -> list[np.ndarray]:
        with self.service.telling("scoring"):
            pending = self._trainer.forward([_scored(d) for d in rows], "cross_entropy")
        return [_array(o["logprobs"]) for o in self.service.wait(pending, "scoring").loss_fn_outputs]

    def _reference(self, rows: Sequence[DatumArrays]) -> list[np.ndarray]:
        types = sdk().types
        with self.service.telling("scoring under the reference"):
            if self._base is None:
                made = self.service.client.create_sampling_client(base_model=self.model)
                self._base = self.service.wait(made, "scoring under the reference")
            pending = [
                self._base.compute_logprobs(
                    types.ModelInput.from_ints([*d.model_input.tolist(), int(d.target_tokens[-1])])
                )
                for d in rows
            ]
        found = [self.service.wait(future, "scoring under the reference") for future in pending]
        # of N + 1 tokens; the first has no log-prob, and some servers leave it out
        return [np.array(l[len(l) - len(d.target_tokens) :], np.float32) for l, d in zip(found, rows, strict=True)]

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


def _trainer(service: Service, model: str, rank: int, seed: int, resume: str | None) -> Any:
    """The SDK's training client, of a fresh LoRA or of a state that was kept."""
    service.refuse_unknown_model(model)
    doing = f"making a LoRA of rank {rank} on {model}" if resume is None else f"resuming {resume}"
    with service.telling(doing):
        if resume is not None:
            return service.wait(service.client.create_training_client_from_state_with_optimizer(resume), doing)
        return service.wait(service.client.create_lora_training_client(model, rank=rank, seed=seed), doing)


def _write_path(folder: Path, path: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / KEPT).write_text(json.dumps({"path": path}) + "\n", encoding="utf-8")


def _read_path(folder: Path) -> str:
    """Where the server keeps what ``_write_path`` was told."""
    try:
        return str(json.loads((folder / KEPT).read_text(encoding="utf-8"))["path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / KEPT} does not say where the server keeps it; remove {folder}") from error


# ---- to the wire


def _datum(d: DatumArrays, loss: TinkerLoss) -> Any:
    named = {"target_tokens": d.target_tokens, "logprobs": d.logprobs, "advantages": d.advantages}
    return _wire(d, {**named, "sequence_ratio_mask": d.mask} if loss.masked else named)


def _scored(d: DatumArrays) -> Any:
    return _wire(d, {"target_tokens": d.target_tokens, "weights": d.mask})


def _wire(d: DatumArrays, arrays: Mapping[str, np.ndarray]) -> Any:
    """A datum of the SDK; servers take short or infinite arrays without a word, so they are looked at here."""
    types = sdk().types
    for name, array in arrays.items():
        if array.shape != d.model_input.shape or not np.isfinite(array).all():
            raise UserError(f"{name} of a datum has shape {array.shape} or is not finite; mend the batch")
    return types.Datum(
        model_input=types.ModelInput.from_ints(d.model_input.tolist()),
        loss_fn_inputs={name: types.TensorData.from_numpy(array) for name, array in arrays.items()},
    )


# ---- from the wire


def _array(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.to_numpy(), np.float32)


def _completion(sequence: Any, sampling: Sampling, untempered: bool) -> Completion:
    tokens = np.asarray(sequence.tokens_np, np.int32)
    logprobs = np.asarray([] if sequence.logprobs_np is None else sequence.logprobs_np, np.float32)
    if tokens.shape != logprobs.shape or not np.isfinite(logprobs).all():
        raise ServiceError(
            f"the server gave {len(logprobs)} log-probs for {len(tokens)} tokens, or some that are not finite; "
            "look at its log, and resume from the last checkpoint"
        )
    temperature = 1.0 if untempered and sampling.temperature else sampling.scored_temperature
    return Completion(tokens, logprobs, None, sequence.stop_reason == "length", temperature)


def _spread(batch: Batch, rows: Sequence[DatumArrays], values: Sequence[np.ndarray]) -> np.ndarray:
    """(B, T) from one array per datum, 0 where nothing was sampled."""
    out = np.zeros(batch.targets.shape, np.float32)
    for d, value in zip(rows, values, strict=True):
        out[d.row, : len(d.mask)] = np.where(d.mask != 0, value[: len(d.mask)], 0)
    return out


def _measured(l: np.ndarray, batch: Batch, how: Surrogate) -> dict[str, float]:
    """The loss, and how far the learner's log-probs l are from the sampler's, as the local engine reports them."""
    live = batch.weights != 0
    d = np.where(live, l - batch.logprobs, 0).astype(np.float64)
    low, high = how.objective.clipped(importance_ratio(d, live, how.ratio, np), batch.advantages)
    return {
        "loss": float(policy_objective(l, batch, np, how)),
        "logprob_gap_max": float(np.abs(d).max()),
        "logprob_gap_mean": float(np.abs(d)[live].mean()),
        "sampler_kl": float((np.exp(np.clip(d, -20, 20)) - 1 - d)[live].mean()),
        "clip_fraction_low": float((live & low)[live].mean()),
        "clip_fraction_high": float((live & high)[live].mean()),
    }


def _told(metrics: Mapping[str, float]) -> dict[str, float]:
    """The gradient's norm where the server says it, by whatever prefix; without it a step counts as one that moved."""
    norms = [value for name, value in metrics.items() if name.partition(":")[0].endswith("grad_norm")]
    return {"grad_norm": float(norms[0]), "updated": float(norms[0] > 0)} if norms else {"updated": 1.0}


def _end_of_sequence(tokenizer: Any) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise UserError("the model's tokenizer names no end of sequence; give stop, the tokens that end a completion")
    return [int(tokenizer.eos_token_id)]


def _refuse_uneven(batch: Batch, how: Surrogate) -> None:
    """The service's ratio per sequence is GSPO-token's, which is GSPO's only where A is one per completion."""
    if how.ratio != "sequence":
        return
    live = batch.weights != 0
    highest = np.where(live, batch.advantages, -np.inf).max(axis=1)
    lowest = np.where(live, batch.advantages, np.inf).min(axis=1)
    if (highest > lowest).any():
        raise UserError(
            "a ratio per sequence meets advantages that differ from token to token, for which the Tinker service has "
            "no loss; set algorithm.ratio to sequence-token, or take --engine mlx"
        )


def _refuse_sampling(prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    if any(len(p) == 0 for p in prompts):
        raise UserError("a prompt holds no tokens; give every prompt at least one")
    for name, value, off in (
        ("min_p", sampling.min_p, 0),
        ("repetition_penalty", sampling.repetition_penalty, 1),
    ):
        if value != off:
            raise UserError(
                f"{name} is {value} and the Tinker service has none; leave it at {off}, or take --engine mlx"
            )
