"""The run folder of every model that a client trains: a row of metrics per step, and what each step learned from."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .._system.files import write_whole
from ..environment.text.conversation import ChatCodec
from ..environment.text.pieces import Pieces
from ..record import layout
from ..record.recorder import Recorder
from ..serving import Datum, Model, Passed
from ..types import Credited, Episode
from .messages import Pass
from .registry import Tenant

MOST = 512  # sequences of a step that are kept


@dataclass(eq=False, slots=True)
class Since:
    """The data that a model has been given since its last step."""

    sums: dict[str, float] = field(default_factory=dict)
    data: list[Datum] = field(default_factory=list)
    passes: int = 0
    sequences: int = 0


class Runs:
    """The run folders below ``folder``. What goes wrong here is logged, and ends no request."""

    def __init__(self, folder: Path, models: Mapping[str, Model]) -> None:
        self.folder, self.models = folder, models
        self._since: dict[str, Since] = {}
        self._last: dict[str, int] = {}  # the number of rows of each model
        self._codec: Callable[[Any], ChatCodec] = cache(ChatCodec.of)
        self._pieces: Callable[[Any], Pieces] = cache(lambda tokenizer: Pieces(self._codec(tokenizer).decode_all))

    def run(self, tenant: Tenant) -> Path:
        """Return the run folder of a model."""
        return self.folder / tenant.id.replace(":", "-")

    def passed(self, tenant: Tenant, asked: Pass, passed: Passed) -> None:
        """Take note of a pass with its gradient."""
        since = self._since.setdefault(tenant.id, Since())
        since.passes, since.sequences = since.passes + 1, since.sequences + len(asked.data)
        for name, value in passed.metrics.items():
            how = name.rpartition(":")[2]
            before = since.sums.get(name, 0.0)
            merge = {"max": max, "min": min}.get(how, lambda a, b: a + b)
            since.sums[name] = float(merge(before, value)) if name in since.sums else float(value)
        since.data += asked.data[: MOST - len(since.data)]

    def stepped(self, tenant: Tenant, metrics: Mapping[str, float]) -> None:
        """Write the row of a step, and what was learned from."""
        since = self._since.pop(tenant.id, Since())
        try:
            self._write(tenant, since, metrics)
        except Exception as error:  # noqa: BLE001 - the step has been taken, and its client is to hear that
            print("".join(traceback.format_exception(error)), file=sys.stderr, flush=True)

    def ended(self, tenant: Tenant) -> None:
        """Note that a model's session has ended."""
        if (run := self.run(tenant)).is_dir():
            write_whole(run / layout.SUMMARY, json.dumps({"steps": tenant.steps, "ended": True}))

    def _write(self, tenant: Tenant, since: Since, metrics: Mapping[str, float]) -> None:
        run, step = self.run(tenant), tenant.steps - 1
        path = run / layout.METRICS
        if not path.exists():
            run.mkdir(parents=True, exist_ok=True)
            adapter = {"kind": "lora", "rank": tenant.adapter.rank}
            about = {"model": tenant.base, "adapter": adapter, "served": {"id": tenant.id, "session": tenant.session}}
            write_whole(run / layout.CONFIG, json.dumps(about, indent=2))
        if tenant.id not in self._last:
            lines = path.read_bytes().splitlines() if path.exists() else []
            self._last[tenant.id] = json.loads(lines[-1])["step"] if lines else -1
        if step <= self._last[tenant.id]:  # carried out again after a kill
            return
        row = {"kind": "train", "step": step, "passes": since.passes, "sequences": since.sequences}
        row |= {name.partition(":")[0] if name.endswith(":sum") else name: v for name, v in since.sums.items()}
        with path.open("ab") as file:
            file.write(json.dumps(row | {name: float(v) for name, v in metrics.items()}).encode() + b"\n")
        self._last[tenant.id] = step
        tokenizer = self.models[tenant.base].tokenizer
        episodes = self._episodes(since.data, self._codec(tokenizer))
        if episodes:
            Recorder(run, self._pieces(tokenizer)).step(step, {}, episodes)

    def _episodes(self, data: Sequence[Datum], codec: ChatCodec) -> list[Episode]:
        """Return the sequences that were sampled; data without the log-probs of a sampler are none."""
        episodes, groups = [], dict[bytes, int]()
        for datum in data:
            targets, sampled, advantages = (datum.inputs.get(n) for n in ("target_tokens", "logprobs", "advantages"))
            if targets is None or sampled is None or advantages is None or targets.ndim != 1 or not len(targets):
                continue
            given = datum.inputs.get("mask")
            own = np.flatnonzero((sampled != 0) | (advantages != 0) if given is None else given != 0)
            start = int(own[0]) if len(own) else len(targets)
            tokens = np.append(datum.tokens[:1], targets).astype(np.int32)
            mask = np.arange(len(tokens)) > start
            prompt = tokens[: start + 1]
            group = groups.setdefault(prompt.tobytes(), len(groups))
            credit = np.where(mask, np.append(0, advantages), 0).astype(np.float32)
            mean = float(credit[mask].mean()) if mask.any() else 0.0
            episodes.append(
                Episode(
                    tokens, mask, np.where(mask, np.append(0, sampled), 0).astype(np.float32), None, np.nan, group,
                    codec.text(prompt.tolist(), special=True), codec.text(tokens[start + 1 :].tolist()),
                    prompt_index=None, credited=Credited(mean, credit),
                )
            )  # fmt: skip
        return episodes
