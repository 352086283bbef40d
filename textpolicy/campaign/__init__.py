"""Run campaigns, arms x seeds over one base configuration, and report their results."""
