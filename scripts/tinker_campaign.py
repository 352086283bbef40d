"""grpo against the full recipe on a Tinker server, seed by seed: a plan by default, the real thing with --execute."""

import sys

from textpolicy.campaign.presets.scripts import script
from textpolicy.campaign.presets.tinker_math import MathCampaignArguments, run

if __name__ == "__main__":
    sys.exit(script("scripts/tinker_campaign.py", MathCampaignArguments, run, sys.argv[1:]))
