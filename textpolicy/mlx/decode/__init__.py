"""Sampling: rows that grow a token at a time, compiled steps, folded weights."""
