"""The learning rate to start from, by the size and family of the model."""

from __future__ import annotations

from ..errors import UserError

POWERS = {"qwen": 0.0775, "llama": 0.781}  # how fast the best rate falls with the hidden size, by model family


def learning_rate(hidden: int, power: float, base: float = 5e-5, lora_multiplier: float = 10.0) -> float:
    """Return base x lora_multiplier x (2000 / hidden)^power, for Adam on a model of that ``hidden`` size.

    ``power`` is the family's, see POWERS. LoRA needs about 10 times the rate of full fine-tuning
    ("LoRA without regret", 2025); set ``lora_multiplier`` to 1 for the latter. The fit is the Tinker
    cookbook's, over supervised runs: a start for a sweep. Raises UserError for a size below 1.
    """
    if hidden < 1:
        raise UserError(f"the hidden size is {hidden}; give the model's, 1 or more")
    return base * lora_multiplier * (2000 / hidden) ** power
