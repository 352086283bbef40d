"""The Engine over a local MLX model: it decodes whole groups at once and updates with shared prompts."""

from __future__ import annotations

import operator
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from ..devices.team import ALONE, UPDATING, Team
from ..engine import Sampling
from ..errors import NotFiniteError, UserError, refuse_outside
from ..losses import Surrogate, correction_weights, echo_loss, kl_estimate, policy_objective, tokens_of
from ..types import Batch, Completion, token_ids
from .adapters.merging import adapters_off, save_adapter, trainable
from .blas import blas_threads
from .collectives import digest, summed
from .decode.compiled_steps import Steps
from .decode.decoder import decode
from .decode.folded_weights import copies, folded
from .kernels import attention, gathers, masks, scans
from .kernels.patching import patched
from .kernels.plain import plain_operations
from .read.bounds import Bounds
from .read.prompts import Kept
from .score.divergences import divergences, teacher_states
from .score.micro_batches import Gradients, Layout, Objective, logprobs_of, micro_batches
from .state import read_arrays, restore_training_state, training_state, write_arrays


class MLXEngine:
    """The engine that samples from and trains one model held in this process.

    ``stop`` are the token ids that end a completion. ``micro_batch_tokens`` bounds the padded
    tokens of one forward and backward pass, ``decode_rows`` the completions decoded side by side,
    and the activations of every ``checkpoint_every``-th block (0: of none) are computed again instead
    of kept: none of these changes a result, only memory. ``compile`` compiles the optimiser, and passes for
    shapes that recur; "auto" does so on a GPU only, because a CPU gains nothing.
    """

    packages = ("mlx", "mlx-lm")

    def __init__(
        self,
        model: nn.Module,
        *,
        stop: Iterable[int],
        optimizer: optim.Optimizer | None = None,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        micro_batch_tokens: int = 8192,
        decode_rows: int = 128,
        checkpoint_every: int = 0,
        compile: bool | Literal["auto"] = "auto",
    ):
        sizes = {"micro_batch_tokens": micro_batch_tokens, "decode_rows": decode_rows}
        for name, size in {"checkpoint_every": checkpoint_every, **sizes}.items():
            refuse_outside(name, size, int(name in sizes), whole=True)
        compiled = mx.default_device() == mx.gpu if compile == "auto" else compile
        if not isinstance(model, nn.Module):
            raise UserError(f"the model is a {type(model).__name__} and no model of mlx; load one with load_model")
        self.model, self.bounds = model, Bounds.of(model)
        self.stop = token_ids(sorted(stop))
        self.optimizer = optimizer or optim.AdamW(0.0, weight_decay=weight_decay, bias_correction=True)
        self.max_grad_norm = max_grad_norm
        self.micro_batch_tokens, self.decode_rows = micro_batch_tokens, decode_rows
        self.checkpoint_every, self.compiled = checkpoint_every, compiled
        self.drafts = True  # the last rows on a CPU may be decoded several tokens at a time; changes no completion
        self.copies = True  # rollouts on a CPU may fold LoRAs into copies of the weights
        # bytes that an "update", and to "decode", may take beyond what is in memory; where they are missing, any
        self.room: dict[str, float] = {}
        self.team: Team = ALONE  # or the ranks of which this process is one, all of which call every method alike
        self._gradients = Gradients(model, checkpoint_every=checkpoint_every, compiled=compiled)
        self._clip = mx.compile(optim.clip_grad_norm) if compiled else optim.clip_grad_norm
        self._apply_gradients: Callable[..., Any] | None = None  # compiled, for the optimiser's state below
        self._compiled_state: Any = None
        self._steps: Steps | None = None  # compiled decoding steps, on a GPU
        self._tried_steps = self._noisy = False
        self._kept: Kept | None = None  # within ``keep_turns``

    @contextmanager
    def keep_turns(self) -> Iterator[None]:
        """Keep what completions have read, within the context, for prompts that continue them.

        Such a prompt is the text of an earlier prompt and its completion, and more: of it only the rest is read. The
        weights must not change meanwhile. The oldest texts leave where memory is short, and are read again.
        """
        self._kept = Kept()
        try:
            yield
        finally:
            self._kept = None

    def sample(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, streams: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """Return ``n`` completions for every prompt (token ids), in prompt order; each prompt is read once.

        Each draws from the random stream of its number in ``streams``, which count from 0 by default. This is the one
        method whose work ranks do not share.
        """
        refuse_outside("n", n, 1, whole=True)
        if any(len(p) == 0 for p in prompts):
            raise UserError("a prompt is empty; give every prompt at least one token")
        if not prompts:
            return []
        read = [token_ids(p, self.bounds.vocabulary) for p in prompts]
        self.bounds.refuse_beyond(max(map(len, read)) + sampling.max_tokens, "a prompt with its completion")
        rows = [p for p in read for _ in range(n)]
        # Kimi K3 compiles a step of its own on Metal, with the adapter as it is the first time
        with patched(self.model, decode_patches()), plain_operations("kimi_k3"), self._within("decode"):
            model = folded(self.model, min(len(rows), self.decode_rows)) if self.copies else self.model
            if not self._tried_steps and mx.default_device() == mx.Device(mx.gpu):
                self._steps, self._tried_steps = Steps.chosen(self.model, self.compiled), True
            if self._kept is not None:
                free = mx.get_memory_limit() - mx.get_active_memory() + self._kept.nbytes
                self._kept.room = free - min(self.room.get("decode", free / 2), free)
            steps = None if self._noisy else self._steps  # which hold the norms as they were compiled with
            more: dict[str, Any] = {"kept": self._kept, "streams": streams, "drafts": self.drafts}
            flat = decode(model, rows, sampling, self.stop, self.decode_rows, steps=steps, **more)
        return [flat[i * n : (i + 1) * n] for i in range(len(prompts))]

    def gradients(self, batch: Batch, objective: Objective) -> tuple[dict[str, float], Any]:
        """Return summed loss statistics and gradients of ``objective`` over micro-batches of ``batch``."""
        self.bounds.check(batch)
        totals: dict[str, float] = {}
        grads, own = None, self._dealt(batch)[self.team.rank]
        with self.team.doing(UPDATING):
            for _, layout in micro_batches(batch.take(own), self.micro_batch_tokens) if len(own) else ():
                with self._within("update"):
                    with patched(self.model, pass_patches()):
                        stats, grad = self._gradients(layout, objective)
                    grads = grad if grads is None else tree_map(mx.add, grads, grad)
                    mx.eval(stats, grads)
                totals = _with(totals, {name: float(np.array(value)) for name, value in stats.items()})
            return self._of_all_ranks(totals, grads)

    def _dealt(self, batch: Batch) -> list[np.ndarray]:
        """Return the rows of ``batch`` for each rank, those of a prompt together where there are prompts enough."""
        if self.team.size == 1:
            return [np.arange(len(batch))]
        starts, lengths = batch.starts, batch.lengths
        prompts: dict[bytes, list[int]] = {}
        for row, (inputs, start) in enumerate(zip(batch.inputs, starts, strict=True)):
            prompts.setdefault(inputs[: start + 1].tobytes(), []).append(row)
        enough = len(prompts) >= 2 * self.team.size
        units = [*prompts.values()] if enough else [[row] for rows in prompts.values() for row in rows]
        costs = [float(starts[rows[0]] + (lengths[rows] - starts[rows]).sum()) for rows in units]
        return [np.array([row for n in places for row in units[n]], int) for places in self.team.share(costs)]

    def _of_all_ranks(self, totals: dict[str, float], grads: Any) -> tuple[dict[str, float], Any]:
        """Return the sums of statistics and gradients over all ranks; ``grads`` is None where a rank had no rows."""
        if self.team.size == 1:
            return totals, grads
        totals = reduce(_with, self.team.exchange(totals))  # after which all are ready to sum
        grads = tree_map(mx.zeros_like, self.model.trainable_parameters()) if grads is None else grads
        return totals, summed(grads, self.team)

    def score(self, batch: Batch, *, reference: bool = False) -> np.ndarray:
        """Return (B, T) float32 log-probs of the batch's sampled targets, 0 elsewhere.

        They are those of the model as it is, or of the frozen ``reference``: the same weights with adapters off.
        """
        self.bounds.check(batch)
        without = adapters_off(self.model) if reference else nullcontext()
        dealt, out = self._dealt(batch), np.zeros(batch.targets.shape, np.float32)
        with self.team.doing(UPDATING):
            with without, patched(self.model, pass_patches()), self._within("update"):
                own = logprobs_of(self.model, batch.take(dealt[self.team.rank]), self.micro_batch_tokens)
            for rows, part in zip(dealt, self.team.exchange(own), strict=True):
                out[rows] = part
        return out

    def update(self, batch: Batch, surrogate: Surrogate, learning_rate: float) -> Mapping[str, float]:
        """Take one optimiser step on ``batch``; rows without advantages are skipped, without a KL, echo or bonus.

        If no row is left, no parameter moves, not even by momentum, and ``updated`` is 0; it is 0, and ``skipped`` 1,
        when the loss or the gradient is not finite. A KL in the loss needs the reference's log-probs, which
        are scored here if the batch lacks them. ``peak_memory_bytes`` is the peak since the previous update,
        rollouts and evaluations included.
        """
        metrics = {"loss": 0.0, "grad_norm": 0.0, "updated": 0.0, "skipped": 0.0}
        learns = (batch.advantages != 0) | (surrogate.kl is not None) | (batch.bonus is not None)
        matters = (batch.weights != 0) & learns | (batch.scored & (batch.weights == 0))
        live = np.flatnonzero(matters.any(axis=1))
        if len(live):
            rows = batch.take(live)
            if surrogate.kl is not None and rows.reference is None:
                rows = replace(rows, reference=self.score(rows, reference=True))
            stats, grads = self.gradients(rows, PolicyObjective(surrogate))
            metrics |= self._step(stats.pop("loss"), grads, learning_rate)
            if not metrics["skipped"]:
                metrics["logprob_gap_max"] = stats.pop("logprob_gap_max")
                tokens = max(stats.pop("tokens"), 1.0)
                metrics |= {name: total / tokens for name, total in stats.items()}  # means over the sampled tokens
        metrics["peak_memory_bytes"] = float(mx.get_peak_memory())
        mx.reset_peak_memory()
        return metrics

    def distil(
        self,
        batch: Batch,
        read: Batch,
        teacher: MLXEngine,
        beta: float,
        learning_rate: float,
        *,
        reference: bool = False,
    ) -> Mapping[str, float]:
        """Take one optimiser step on sum_t w_t D_beta(p_t, q_t) over the whole vocabulary, w the weights of ``batch``.

        p is this model's distribution and q that of ``teacher``, which may be this engine, of its adapter off if
        ``reference``. ``read`` holds the same rows after the prompts that the teacher reads. ``losses.divergence`` has
        D; the metrics are those of ``update``.
        """
        self.bounds.check(batch)
        teacher.bounds.check(read)
        live = np.flatnonzero((batch.weights != 0).any(axis=1))
        metrics = {"loss": 0.0, "grad_norm": 0.0, "updated": 0.0, "skipped": 0.0}
        total, grads = 0.0, None
        batch, read = batch.take(live), read.take(live)
        own = self._dealt(batch)[self.team.rank]
        batch, read = batch.take(own), read.take(own)
        for rows, layout in micro_batches(batch, self.micro_batch_tokens) if len(own) else ():
            without = adapters_off(teacher.model) if reference else nullcontext()
            with self._within("update"), plain_operations():
                with without, patched(teacher.model, pass_patches()):
                    theirs = teacher_states(teacher.model, layout, Layout.build(read.take(rows)))
                    mx.eval(theirs)
                with patched(self.model, pass_patches()):
                    weights = mx.array(layout.rows.weights)

                    def loss(
                        model: nn.Module, layout: Layout = layout, q: mx.array = theirs, w: mx.array = weights
                    ) -> mx.array:
                        found = divergences(model, layout, teacher.model, q, beta, self.checkpoint_every)
                        return (w * found).sum()

                    value, grad = nn.value_and_grad(self.model, loss)(self.model)
                grads = grad if grads is None else tree_map(mx.add, grads, grad)
                mx.eval(value, grads)
            total += value.item()
        if len(live):
            with self.team.doing(UPDATING):
                totals, grads = self._of_all_ranks({"loss": total}, grads)
            metrics |= self._step(totals["loss"], grads, learning_rate)
        metrics["peak_memory_bytes"] = float(mx.get_peak_memory())
        mx.reset_peak_memory()
        return metrics

    def _step(self, loss: float, grads: Any, learning_rate: float) -> dict[str, float]:
        """Apply gradients; return the metrics of an update, which changes nothing where one is not finite."""
        try:
            norm = self.apply(grads, learning_rate) if np.isfinite(loss) else np.nan
        except NotFiniteError:
            norm = np.nan
        if np.isnan(norm):
            return {"loss": 0.0, "grad_norm": 0.0, "updated": 0.0, "skipped": 1.0}
        return {"loss": loss, "grad_norm": norm, "updated": float(norm > 0), "skipped": 0.0}

    def apply(self, grads: Any, learning_rate: float | None = None) -> float:
        """Clip and apply gradients; return their norm before. Raises NotFiniteError, with nothing changed.

        Raises UserError for weights in half precision, which round most of a small step away.
        """
        for name, value in trainable(self.model).items():
            if value.dtype != mx.float32:
                raise UserError(
                    f"{name} is trained in {str(value.dtype).removeprefix('mlx.core.')}, which rounds most steps away; "
                    "attach an adapter (the kind full trains all weights), or call model.set_dtype(mx.float32)"
                )
        grads, norm = self._clip(grads, self.max_grad_norm)
        if not np.isfinite(norm.item()):
            raise NotFiniteError(
                f"the gradient norm is {norm.item()}; nothing was updated: "
                "lower the learning rate or check the rewards for huge values"
            )
        if norm.item() == 0:  # an adaptive optimiser would move by its momentum
            return 0.0
        optimizer, parameters = self.optimizer, self.model.trainable_parameters()
        if learning_rate is not None:
            optimizer.learning_rate = learning_rate
        if not self.compiled:
            optimizer.update(self.model, grads)
        else:
            if self._apply_gradients is None or self._compiled_state is not optimizer.state:
                optimizer.init(parameters)
                self._compiled_state = optimizer.state
                self._apply_gradients = mx.compile(
                    optimizer.apply_gradients, inputs=optimizer.state, outputs=optimizer.state
                )
            self.model.update(self._apply_gradients(grads, parameters))
        mx.eval(self.model.parameters(), optimizer.state)
        return float(norm.item())

    @contextmanager
    def noisy(self, sigma: float, seed: int) -> Iterator[None]:
        """Add draws of N(0, sigma^2) to the weights of every block's norms within the context, for all that is done.

        Neither adapters nor checkpoints have it. Raises UserError for a model without such weights.
        """
        if not sigma:
            yield
            return
        parts: list[Any] = [part for block in self.model.layers for part in block.children().values()]
        norms = [(p, p.weight) for p in parts if type(p).__name__.endswith("Norm") and "weight" in p]
        if not norms:
            raise UserError("rollout.norm_noise is set and the blocks of this model have no norms; leave it out")
        draw, self._noisy = np.random.default_rng(seed), True
        try:
            for part, weight in norms:
                noise = sigma * draw.standard_normal(weight.shape)
                part.weight = (weight.astype(mx.float32) + mx.array(noise, mx.float32)).astype(weight.dtype)
            yield
        finally:
            for part, weight in norms:
                part.weight = weight
            self._noisy = False

    def digest(self) -> int:
        """Return a number that differs where trainable parameters do, in any bit."""
        return digest([*trainable(self.model).values()])

    def save(self, path: Path) -> None:
        """Write the adapter in mlx-lm's layout to the folder ``path``, whole or not at all."""
        save_adapter(self.model, path)

    def weights(self) -> dict[str, mx.array]:
        """Return a copy of the trainable parameters, for keeping the best of a run."""
        return {name: mx.array(value) for name, value in trainable(self.model).items()}

    def restore(self, weights: Mapping[str, mx.array]) -> None:
        """Set the parameters to what ``weights`` returned."""
        self.model.load_weights(list(weights.items()), strict=False)

    def write_weights(self, weights: Mapping[str, mx.array], folder: Path) -> None:
        """Write what ``weights`` returned into the new folder ``folder``. Raises OSError."""
        folder.mkdir()
        write_arrays(folder / "weights.safetensors", weights, {})

    def read_weights(self, folder: Path) -> dict[str, mx.array]:
        """Return what ``write_weights`` wrote. Raises UserError."""
        return read_arrays(folder / "weights.safetensors")[0]

    def write_state(self, folder: Path) -> None:
        """Write all that updates change, and the sizes of passes, into ``folder``, bit for bit. Raises OSError."""
        sizes: dict[str, Any] = {"micro_batch_tokens": self.micro_batch_tokens, "decode_rows": self.decode_rows}
        sizes |= {"copies": self.copies, "room": self.room}
        shapes = [key if isinstance(key, str) else repr(key) for key in self._gradients.known]
        notes = {**sizes, "shapes_seen": shapes}  # a resumed run compiles the same ones as it would have
        write_arrays(folder / "engine.safetensors", training_state(self.model, self.optimizer), notes)

    def read_state(self, folder: Path) -> None:
        """Resume from what ``write_state`` wrote. Raises UserError, changing nothing, for that of another model."""
        arrays, notes = read_arrays(folder / "engine.safetensors")
        restore_training_state(self.model, self.optimizer, arrays, folder)
        self.micro_batch_tokens = min(self.micro_batch_tokens, notes["micro_batch_tokens"])
        self.decode_rows = min(self.decode_rows, notes["decode_rows"])
        self.copies = self.copies and notes.get("copies", True)
        self.room = self.room or notes.get("room", {})
        self._gradients.known = OrderedDict.fromkeys(notes["shapes_seen"])

    @contextmanager
    def _within(self, what: str) -> Iterator[None]:
        """Make MLX wait for work in flight, within the context, where ``what`` would take more than its ``room``."""
        limit = int(mx.get_active_memory() + min(self.room.get(what, 2**60), 2**60))
        before = mx.set_memory_limit(limit)
        mx.set_memory_limit(min(before, limit))
        try:
            yield
        finally:
            mx.set_memory_limit(before)

    def close(self, status: str = "success") -> None:
        """Do nothing, since nothing is held outside this process."""

    @property
    def platform(self) -> dict[str, str]:
        """The facts that the last bits of its numbers depend on, besides the versions of packages."""
        info = mx.device_info()
        names = [str(info[name]) for name in ("device_name", "architecture") if name in info]
        unsteady = gathers.unsteady(self.model)
        return {
            **({"not_bit_for_bit": unsteady} if unsteady else {}),
            "device": f"{mx.default_device()} {' '.join(names)}".strip(),
            "blas_threads": str(blas_threads()),
            "MLX_ENABLE_TF32": os.environ.get("MLX_ENABLE_TF32", "1"),  # 1: GPUs round operands of float32 to 11 bits
            "copies": str(copies(self.model)),  # bytes; whether rollouts make them depends on the machine's memory
        }


def decode_patches() -> Mapping[str, Callable[..., Any]]:
    """Return the functions that replace mlx-lm's while completions are sampled."""
    experts = {} if mx.metal.is_available() else gathers.patches()  # MLX's own are wrong on CUDA alone
    return {**attention.patches(), **experts, **scans.patches()}


def _with(totals: dict[str, float], more: Mapping[str, float]) -> dict[str, float]:
    """Return sums with ``more`` added, and with the larger of two where a name ends with _max."""
    together: dict[bool, Callable[[float, float], float]] = {True: max, False: operator.add}
    added = {n: together[n.endswith("_max")](totals[n], value) if n in totals else value for n, value in more.items()}
    return totals | added


def pass_patches() -> Mapping[str, Callable[..., Any]]:
    """Return the functions that replace mlx-lm's in passes over whole batches."""
    return {**attention.patches(), **masks.patches(), **gathers.patches(), **scans.patches()}


@dataclass(frozen=True, repr=False)
class PolicyObjective:
    """The loss of a surrogate; equal surrogates share a compiled function."""

    surrogate: Surrogate

    def __repr__(self) -> str:
        return f"PolicyObjective(how={self.surrogate!r})"  # as checkpoints record it, in "shapes_seen"

    def __call__(self, logprobs: mx.array, rows: Any) -> tuple[mx.array, dict[str, mx.array]]:
        """Return the loss, and sums over sampled tokens that tell how far the learner is from the sampler."""
        surrogate = self.surrogate
        loss = policy_objective(logprobs, rows, mx, surrogate)
        if rows.echo is not None:
            loss = loss + echo_loss(logprobs, rows, mx)
        if rows.bonus is not None:
            loss = loss - rows.bonus.sum()
        live = rows.weights != 0
        gap = mx.where(live, logprobs - rows.logprobs, 0)
        at = tokens_of(logprobs, rows, mx, surrogate)
        low, high = surrogate.objective.clipped(at, mx)
        count = {
            "tokens": live,
            "logprob_gap_mean": mx.abs(gap),
            "sampler_kl": mx.exp(mx.clip(gap, -20, 20)) - 1 - gap,
            "clip_fraction_low": live & low,
            "clip_fraction_high": live & high,
        }
        if surrogate.kl is not None:
            count["reference_kl"] = live * kl_estimate(logprobs, rows.reference, "k3", mx, limit=20)
        if surrogate.correction is not None:
            weights = correction_weights(at.old, rows.logprobs, live, surrogate.correction, mx)
            count |= {"correction_mean": live * weights, "correction_dropped": live & (weights == 0)}
        sums = {name: mx.stop_gradient(value.sum()) for name, value in count.items()}
        extremes = {"logprob_gap_max": mx.stop_gradient(mx.abs(gap).max())}
        return loss, {"loss": mx.stop_gradient(loss), **extremes, **sums}
