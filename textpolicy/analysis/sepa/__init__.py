"""The records and verdicts of SEPA experiments."""
