"""The training step and what surrounds it: sample, score, credit, update, evaluate."""

from .train import Schedule as Schedule
from .train import Session as Session
from .train import train as train
