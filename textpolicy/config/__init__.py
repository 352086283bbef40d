"""What a run is told: its settings, the kinds of adapter, a recipe's parameters, command-line flags."""
