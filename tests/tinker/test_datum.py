"""datum_arrays: what a Tinker datum is made of, and that nothing in it is off by one."""

from dataclasses import replace

import numpy as np
import pytest

from textpolicy.errors import UserError
from textpolicy.tinker.datum import datum_arrays
from textpolicy.types import Batch, Completion, Episode


def episode(prompt, completion, logprobs=None):
    logprobs = np.full(len(completion), -1.0) if logprobs is None else logprobs
    sampled = Completion(np.array(completion, np.int32), np.array(logprobs, np.float32))
    return Episode.from_completion(prompt, sampled, reward=0.0, group=0)


def pack(*episodes, advantage=1.0):
    return Batch.pack(episodes, [np.full(len(e.tokens), advantage) for e in episodes])


def test_the_last_prompt_token_predicts_the_first_completion_token():
    (datum,) = datum_arrays(pack(episode([7, 8], [3, 4, 5], [-0.1, -0.2, -0.3])))
    # reads        7     8     3     4
    # is scored on 8     3     4     5
    assert datum.model_input.tolist() == [7, 8, 3, 4]
    assert datum.target_tokens.tolist() == [8, 3, 4, 5]
    assert datum.mask.tolist() == [0, 1, 1, 1]
    np.testing.assert_allclose(datum.logprobs, [0, -0.1, -0.2, -0.3])


def test_a_deterministic_model_gives_every_sampled_target_probability_one():
    """The model says n + 1 after n; a datum shifted by one either way would score nothing right."""
    (datum,) = datum_arrays(pack(episode([10, 11], [12, 13, 14])))
    right = datum.target_tokens == datum.model_input + 1
    assert right[datum.mask != 0].all()
    for planted in (datum.model_input, np.roll(datum.target_tokens, -1)):  # not shifted, shifted twice
        assert not (planted == datum.model_input + 1)[datum.mask != 0].any()


def test_padding_stays_behind():
    long, short = episode([1, 2, 3], [4, 5, 6, 7]), episode([9], [8])
    data = datum_arrays(pack(long, short))
    assert [d.model_input.tolist() for d in data] == [[1, 2, 3, 4, 5, 6], [9]]
    assert [d.target_tokens.tolist() for d in data] == [[2, 3, 4, 5, 6, 7], [8]]


@pytest.mark.parametrize("prompt", [[1], [1, 2, 3]])
def test_a_sequence_without_sampled_tokens_has_no_datum_and_others_keep_their_row(prompt):
    assert datum_arrays(pack(episode(prompt, []))) == []
    assert [d.row for d in datum_arrays(pack(episode(prompt, []), episode([4], [5])))] == [1]


def test_advantages_are_untouched_on_sampled_tokens_and_zero_elsewhere():
    e = episode([1, 2, 3], [4, 5])
    (datum,) = datum_arrays(Batch.pack([e], [np.array([9, 9, 9, 0.25, -2])]))
    assert datum.advantages.tolist() == [0, 0, 0.25, -2]


def test_weighted_advantages_sum_to_the_token_mean_over_all_data():
    batch = pack(episode([1, 2], [3, 4, 5]), episode([1], [2]), advantage=2.0)
    data = datum_arrays(replace(batch, advantages=batch.advantages * batch.weights))
    assert sum(d.advantages.sum() for d in data) == pytest.approx(2.0)


def test_a_token_that_the_environment_wrote_between_two_turns_is_masked():
    e = episode([1, 2], [3, 4, 5])
    mask = np.array([False, False, True, False, True])
    (datum,) = datum_arrays(pack(replace(e, mask=mask)))
    assert datum.mask.tolist() == [0, 1, 0, 1]
    assert datum.logprobs.tolist() == [0, -1, 0, -1]


def test_every_array_has_one_entry_per_position_in_a_dtype_of_the_wire():
    (datum,) = datum_arrays(pack(episode([1, 2], [3, 4])))
    arrays = (datum.model_input, datum.target_tokens, datum.logprobs, datum.advantages, datum.mask)
    assert {a.shape for a in arrays} == {(3,)}
    assert [a.dtype for a in arrays] == [np.int64, np.int64, np.float32, np.float32, np.float32]


def test_a_completion_with_nothing_before_it_is_refused():
    with pytest.raises(UserError, match="prompt"):
        pack(episode([], [1, 2]))


def test_log_probs_that_do_not_match_the_tokens_are_refused():
    with pytest.raises(UserError, match="one entry per token"):
        pack(episode([1], [2, 3], [-0.1]))
