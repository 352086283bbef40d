"""SEPA against HICRA on countdown, seed by seed: a plan by default, the real thing with --execute."""

import sys

from textpolicy.campaign.presets.scripts import script
from textpolicy.campaign.presets.sepa import SEPACampaignArguments, run

if __name__ == "__main__":
    sys.exit(script("scripts/sepa_campaign.py", SEPACampaignArguments, run, sys.argv[1:]))
