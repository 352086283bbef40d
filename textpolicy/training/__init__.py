"""The ``Trainer`` of the step-by-step API and its advantage transforms."""

from .trainer import Trainer as Trainer
from .trainer import build_gtpo_hicra_transform as build_gtpo_hicra_transform
from .trainer import build_gtpo_transform as build_gtpo_transform
