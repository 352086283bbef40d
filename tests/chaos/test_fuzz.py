"""A few thousand executions of every target of fuzz.py; a million are in benchmarks/results/fuzz.jsonl."""

import warnings

import pytest
from fuzz import SHARES, fuzz

FEW = {"mathematics": 10, "gguf": 50, "models": 20, "adapters": 200}


@pytest.mark.parametrize("name", SHARES)
def test_hostile_files_and_texts_are_read_or_refused_in_one_sentence(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of numpy and jinja on nonsense
        row = fuzz(name, FEW.get(name, 500), first_seed=1)
    assert row["executions"] >= FEW.get(name, 500)
    assert 0 <= row["refused"] <= row["executions"]
