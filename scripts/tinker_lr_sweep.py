"""Learning rates on a Tinker server: short runs of each, and the best one per recipe."""

import sys

from textpolicy.campaign.presets.lr_sweep import SweepArguments, run
from textpolicy.campaign.presets.scripts import script

if __name__ == "__main__":
    sys.exit(script("scripts/tinker_lr_sweep.py", SweepArguments, run, sys.argv[1:]))
