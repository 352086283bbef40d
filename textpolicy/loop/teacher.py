"""The teacher of a distillation: how far its log-probs of what the policy sampled are above the policy's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from ..algorithms import Algorithm
from ..engine import Engine
from ..environment.base import DrivenEnv
from ..environment.single_turn import TextGenerationEnv
from ..errors import UserError
from ..types import Batch, Episode, Floats, over_episode, token_ids

Context = Literal["none", "answer", "demonstration", "sibling"]
TOLD = {  # what a teacher reads after the question, and the policy does not
    "answer": "The answer is: {}",
    "demonstration": "An example of a good response:\n{}",
    "sibling": "A response to this that was correct:\n{}",
}

PROBES = (  # texts that tokenizers of different families split differently
    "The quick brown fox jumps over the lazy dog.",
    "  two  spaces,\n\n\tand a tab",
    "3.14159 + 2718 = 42, 1000000",
    "na\u00efve fa\u00e7ade \u65e5\u672c\u8a9e \u0440\u0443\u0441 \U0001f642",
    "def f(x_1):\n    return x_1 ** 2  # <|im_end|></s><eos>",
)


class Scorer(Protocol):
    """The engine, as far as a teacher needs one."""

    def score(self, batch: Batch, *, reference: bool = False) -> Floats:
        """Return (B, T) float32 log-probs of the batch's targets, 0 off the mask."""


@dataclass(frozen=True)
class Teacher:
    """The scorer of what the policy samples: another model, or the policy's own with its adapter off or on.

    With a ``context`` it reads more than the policy did: the answer or a demonstration (columns of the example), or a
    correct sibling, another completion of the group. A completion without one is not taught.
    """

    scorer: Scorer | None = None  # None: the policy's engine
    reference: bool = False  # with the adapter off
    context: Context = "none"
    by_sampler: bool = False  # l is what the sampler reported, and not scored again by the learner
    beta: float | None = None  # of the divergence of whole distributions; None: sampled tokens

    def teach(self, engine: Engine, env: TextGenerationEnv | DrivenEnv, episodes: Sequence[Episode]) -> list[Episode]:
        """Return the episodes with ``lead``, q - l of each sampled token, in nats. Raises UserError.

        A teacher that is the policy, without context, has a lead of exactly 0, since both score the same arrays.
        """
        told, read = self._read(env, episodes)
        q = _scored(self.scorer or engine, read, self.reference)
        l = [e.logprobs[e.mask] for e in episodes] if self.by_sampler else _scored(engine, episodes, False)
        out = []
        for e, prompt, ours, theirs in zip(episodes, told, l, q, strict=True):
            lead = np.zeros(len(e.tokens), np.float32)
            if prompt is not None or self.context == "none":
                lead[e.mask] = theirs - ours
            out.append(replace(e, lead=lead))
        return out

    def update(
        self,
        engine: Any,
        env: TextGenerationEnv | DrivenEnv,
        episodes: Sequence[Episode],
        algorithm: Algorithm,
        learning_rate: float,
    ) -> Mapping[str, float]:
        """Take one step of ``engine``, a local one, towards the teacher's distribution at each sampled token.

        The loss is sum_t w_t D_beta with the weights of the ``algorithm``'s aggregation; rewards play no part.
        """
        _, read = self._read(env, episodes)
        ours, theirs = (
            Batch.pack(es, [e.mask.astype(np.float32) for e in es], algorithm.aggregation, algorithm.length)
            for es in (episodes, read)
        )
        scorer = self.scorer or engine
        metrics: Mapping[str, float] = engine.distil(
            ours, theirs, scorer, self.beta, learning_rate, reference=self.reference
        )
        return metrics

    def _read(
        self, env: TextGenerationEnv | DrivenEnv, episodes: Sequence[Episode]
    ) -> tuple[list[Sequence[int] | None], list[Episode]]:
        """Return the prompts with context, None without, and the episodes as the teacher reads them."""
        told = [self._told(env, e, episodes) for e in episodes]
        pairs = zip(episodes, told, strict=True)
        return told, [e if prompt is None else with_prompt(e, prompt) for e, prompt in pairs]

    def _told(
        self, env: TextGenerationEnv | DrivenEnv, episode: Episode, episodes: Sequence[Episode]
    ) -> Sequence[int] | None:
        """Return the prompt with the context of an episode, as token ids; None where it has none."""
        if self.context == "none":
            return None
        if isinstance(env, DrivenEnv) or episode.prompt_index is None:
            raise UserError(
                "a teacher reads more than the policy where prompts are this program's own; set stage.context to none"
            )
        if self.context == "sibling":
            texts = [o.text for o in episodes if o.group == episode.group and o is not episode and o.is_correct]
        else:
            example = env.examples[episode.prompt_index]
            if self.context not in example:
                raise UserError(
                    f"the teacher is to read the {self.context} and problem {episode.prompt_index} has none; give the "
                    "rows such a column, or choose another stage.context"
                )
            texts = [str(example[self.context])]
        return env.told(episode.prompt_index, TOLD[self.context].format(texts[0])) if texts else None


def refuse_other_tokens(ours: Any, theirs: Any, teacher: str) -> None:
    """Raise UserError unless both tokenizers make the same tokens of ``PROBES``: ids mean nothing to another model."""
    for probe in PROBES:
        if list(ours.encode(probe)) != list(theirs.encode(probe)):
            raise UserError(
                f"the teacher {teacher} has another tokenizer than the policy (they differ on {probe!r}), so it cannot "
                "score what the policy samples; choose a model of the same family, or set stage.teacher to base"
            )


def teacher_kl(episodes: Sequence[Episode]) -> float:
    """Return the mean of l - q over the sampled tokens, an estimate of the reverse KL to the teacher, in nats."""
    leads = [e.lead[e.mask] for e in episodes if e.lead is not None]
    return -float(np.concatenate(leads).mean(dtype=np.float64)) if sum(map(len, leads)) else 0.0


def with_prompt(episode: Episode, prompt: Sequence[int]) -> Episode:
    """Return the episode after another ``prompt`` (token ids): from its first sampled token on it is the same."""
    start, zeros = int(np.argmax(episode.mask)), np.zeros(len(prompt))
    return replace(
        episode,
        tokens=np.concatenate([token_ids(prompt), episode.tokens[start:]]),
        mask=np.concatenate([zeros, episode.mask[start:]]).astype(bool),
        logprobs=np.concatenate([zeros, episode.logprobs[start:]]).astype(np.float32),
        entropy=None,
        reference=None,
    )


def _scored(scorer: Scorer, episodes: Sequence[Episode], reference: bool) -> list[Floats]:
    """Return the log-probs of each episode's sampled tokens, (T,) float32."""
    batch = Batch.pack(episodes, [np.zeros(len(e.tokens), np.float32) for e in episodes])
    lines = scorer.score(batch, reference=reference)
    return [over_episode(line, e)[e.mask] for line, e in zip(lines, episodes, strict=True)]
