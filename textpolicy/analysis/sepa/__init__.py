"""The records of SEPA experiments, and the tests of their results."""
