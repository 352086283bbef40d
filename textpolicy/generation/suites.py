"""The suites of writing tasks with target words and lengths, and an environment that evaluates a model on one."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..environment.single_turn import TextGenerationEnv
from ..errors import UserError, unknown_name
from ..rewards.example import texts

CONNECTIVES = ("because", "therefore", "however", "first", "then", "finally", "for example", "so that", "although")


@dataclass(frozen=True)
class TextGenerationTask:
    """The prompt for a text, and the criteria that score it."""

    prompt: str
    target_keywords: Sequence[str]  # found anywhere in the text, in upper or lower case
    target_length_range: tuple[int, int]  # words, both ends included
    difficulty: float = 0.5  # 0 easy to 1 hard, for the reader
    category: str = "general"
    evaluation_criteria: Mapping[str, float] = (
        field(  # weights of "length" (or "length_weight"), "keyword", "coherence"
            default_factory=lambda: {"length": 0.3, "keyword": 0.4, "coherence": 0.3}
        )
    )

    def __post_init__(self) -> None:
        low, high = self.target_length_range
        if not 0 <= low <= high or high == 0:
            raise UserError(f"target_length_range is {(low, high)}; give two word counts, the smaller first")
        texts("target_keywords", self.target_keywords)
        named = [str(name).removesuffix("_weight") for name in self.evaluation_criteria]
        for name, weight in zip(named, self.evaluation_criteria.values(), strict=True):
            if name not in CRITERIA:
                raise unknown_name("criterion of a task", name, CRITERIA)
            if named.count(name) > 1:
                raise UserError(f"evaluation_criteria has both {name!r} and '{name}_weight'; give one of them")
            if not isinstance(weight, numbers.Real) or not math.isfinite(weight):
                raise UserError(f"the weight of {name!r} in evaluation_criteria is {weight!r}; give a number")


# ---- scores, all from 0 to 1


def length_score(text: str, task: TextGenerationTask) -> float:
    """Return 1 inside the range of words, and max(0, 1 - d / m) at distance d from it; m is its midpoint."""
    low, high = task.target_length_range
    n = len(text.split())
    return max(0.0, 1 - max(low - n, n - high, 0) / ((low + high) / 2))


def keyword_score(text: str, task: TextGenerationTask) -> float:
    """Return the share of the keywords that occur; 1 for a task without keywords."""
    return len(keywords_found(text, task)) / len(task.target_keywords) if task.target_keywords else 1.0


def coherence_score(text: str, task: TextGenerationTask) -> float:
    """Return the mean of min(1, connectives / 2) and min(1, sentences / 3); 0.5 for one sentence, 0 for no text."""
    sentences = [part for part in re.split(r"[.!?]+", text) if part.strip()]
    if len(sentences) < 2:
        return 0.5 if sentences else 0.0
    connectives = sum(word in text.lower() for word in CONNECTIVES)
    return (min(1.0, connectives / 2) + min(1.0, len(sentences) / 3)) / 2


CRITERIA: dict[str, Callable[[str, TextGenerationTask], float]] = {
    "length": length_score,
    "keyword": keyword_score,
    "coherence": coherence_score,
}


def keywords_found(text: str, task: TextGenerationTask) -> list[str]:
    """Return the task's keywords that occur in ``text``."""
    return [word for word in task.target_keywords if word.lower() in text.lower()]


def task_score(text: str, task: TextGenerationTask) -> float:
    """Return the weighted sum of the task's criteria."""
    weights = task.evaluation_criteria.items()
    return sum(weight * CRITERIA[name.removesuffix("_weight")](text, task) for name, weight in weights)


# ---- the registry

Loader = Callable[[], Sequence[TextGenerationTask]]


def register_task_suite(name: str, loader: Loader) -> None:
    """Register ``loader()`` as the suite ``name``; every ``get_task_suite`` calls it. Raises TypeError."""
    if not callable(loader):
        raise TypeError(
            f"the loader of task suite {name!r} is {loader!r}; give a function that returns a list of tasks"
        )
    SUITES[name] = loader


def list_task_suites() -> list[str]:
    """Return the names of the suites, sorted."""
    return sorted(SUITES)


def get_task_suite(name: str) -> list[TextGenerationTask] | None:
    """Return the tasks of a suite, or None if no suite has that name."""
    return list(SUITES[name]()) if name in SUITES else None


def _basic() -> list[TextGenerationTask]:
    return [
        TextGenerationTask("Why is the sky blue?", ["light", "scatter"], (20, 60), 0.2, "explanation"),
        TextGenerationTask(
            "How do plants make their food?", ["light", "water", "leaves"], (20, 60), 0.2, "explanation"
        ),
        TextGenerationTask("Describe a rainy day in a city.", ["rain", "street"], (20, 60), 0.3, "description"),
        TextGenerationTask("Tell a short story about a lost key.", ["key", "found"], (30, 80), 0.4, "story"),
        TextGenerationTask("How do you make a cup of tea?", ["water", "tea", "cup"], (20, 60), 0.2, "instruction"),
    ]


def _challenging() -> list[TextGenerationTask]:
    return [
        TextGenerationTask(
            "Compare solar and wind energy for a small town, and recommend one.",
            ["solar", "wind", "cost", "recommend"],
            (60, 140),
            0.8,
            "comparison",
        ),
        TextGenerationTask(
            "Explain to a child why the seasons change, with an example.",
            ["tilt", "sun", "example", "winter"],
            (50, 120),
            0.7,
            "explanation",
        ),
    ]


SUITES: dict[str, Loader] = {"basic": _basic, "challenging": _challenging}


# ---- the environment


class TextGenerationEnvironment(TextGenerationEnv):
    """The prompts of a suite, scored by length, keywords and coherence, and a model to evaluate on them."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        task_suite: str = "basic",
        num_episodes: int = 50,
        generation_params: Mapping[str, Any] | None = None,
        seed: int = 42,
    ) -> None:
        """Prepare the suite; ``evaluate_model`` generates ``num_episodes`` texts, cycling through its tasks.

        ``generation_params`` are those of ``create_policy``, over max_tokens 50, temperature 0.8 and top_p 0.95.
        Raises UserError for a missing model or tokenizer, or an unregistered suite.
        """
        if model is None or tokenizer is None:
            missing = "model" if model is None else "tokenizer"
            raise UserError(f"TextGenerationEnvironment has no {missing}; pass what load_model returned")
        if num_episodes < 1:
            raise UserError(f"num_episodes is {num_episodes}; set it to 1 or more")
        if not (tasks := get_task_suite(task_suite)):
            raise unknown_name("task suite with tasks", task_suite, SUITES)
        self.model, self.tasks, self.num_episodes = model, tasks, num_episodes
        self.generation_params = {"max_tokens": 50, "temperature": 0.8, "top_p": 0.95, **(generation_params or {})}
        self.baseline: dict[str, Any] | None = None

        def reward(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
            return task_score(completion, example["task"])

        super().__init__(
            [task.prompt for task in tasks],
            reward,
            self.generation_params["max_tokens"],
            seed,
            tokenizer,
            [{"task": task} for task in tasks],
        )

    def reset(self) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode; info adds task_category, difficulty, target_keywords and target_length_range."""
        observation, info = super().reset()
        task = self.tasks[info["prompt_index"]]
        return observation, {
            **info,
            "task_category": task.category,
            "difficulty": task.difficulty,
            "target_keywords": list(task.target_keywords),
            "target_length_range": task.target_length_range,
        }

    def step(self, action: Any, truncated: bool = False) -> dict[str, Any]:
        """Score a completion, as ``TextGenerationEnv``.

        info adds reward_score, task_category, target_keywords_found, response_length (words) and
        target_length_range.
        """
        task = self.tasks[self._prompt_index(self._episode)]
        result = super().step(action, truncated)
        text = result["info"]["response"]
        result["info"] |= {
            "reward_score": result["reward"],
            "task_category": task.category,
            "target_keywords_found": keywords_found(text, task),
            "response_length": len(text.split()),
            "target_length_range": task.target_length_range,
        }
        return result

    def evaluate_model(self, mode: Literal["current", "baseline"] = "current") -> dict[str, Any]:
        """Generate texts with the model and return their scores.

        Returns mean_score, std_score, num_episodes and category_breakdown (category -> mean). "baseline"
        stores the result; "current" then adds baseline_score, improvement and improvement_percent
        (None where the baseline is 0). Both draw from the same seeds. Raises UserError for another mode.
        """
        if mode not in ("current", "baseline"):
            raise unknown_name("mode of evaluation", mode, ("current", "baseline"))
        from .mlx_generation import create_policy  # here, because it imports mlx

        policy = create_policy(self.model, self.tokenizer, {**self.generation_params, "seed": self.seed})
        order = [n % len(self.tasks) for n in range(self.num_episodes)]
        written = policy.sample_batch([self.prompt_ids(i) for i in order])
        scores = np.array([self.score(i, ids, False).reward for i, (ids, _) in zip(order, written, strict=True)])
        categories = np.array([self.tasks[i].category for i in order])
        result: dict[str, Any] = {
            "mean_score": float(scores.mean()),
            "std_score": float(scores.std()),
            "num_episodes": self.num_episodes,
            "category_breakdown": {name: float(scores[categories == name].mean()) for name in sorted(set(categories))},
        }
        if mode == "baseline":
            self.baseline = result
        elif self.baseline is not None:
            baseline = self.baseline["mean_score"]
            gain = result["mean_score"] - baseline
            percent = 100 * gain / baseline if baseline else None
            result |= {"baseline_score": baseline, "improvement": gain, "improvement_percent": percent}
        return result
