"""One training step, and what surrounds it: sample, score, credit, update, evaluate."""

from .train import Schedule as Schedule
from .train import draw_prompts as draw_prompts
from .train import train as train
