"""The configuration of a run: its settings, the kinds of adapter, a recipe's parameters, command-line flags."""
