"""The campaigns that scripts start: Tinker math, SEPA against its baseline, learning rates."""
