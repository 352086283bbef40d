"""learning_rate: the cookbook's fit, at points that can be worked by hand."""

import subprocess
import sys

import pytest

from textpolicy.errors import UserError
from textpolicy.tinker.hparams import POWERS, learning_rate


@pytest.mark.parametrize("power", POWERS.values())
def test_at_hidden_size_2000_every_family_has_ten_times_the_base_rate(power):
    assert learning_rate(2000, power) == pytest.approx(5e-4)


def test_a_model_twice_as_wide_has_a_rate_lower_by_two_to_the_power():
    assert learning_rate(4000, 1.0) == pytest.approx(2.5e-4)
    assert learning_rate(8000, 0.5) == pytest.approx(2.5e-4)


def test_full_fine_tuning_is_a_multiplier_of_one():
    assert learning_rate(2000, 0.3, base=1e-4, lora_multiplier=1) == pytest.approx(1e-4)


def test_llamas_fall_faster_with_size_than_qwens():
    assert learning_rate(8192, POWERS["llama"]) < learning_rate(8192, POWERS["qwen"])


def test_a_size_of_nothing_is_refused():
    with pytest.raises(UserError, match="hidden size is 0"):
        learning_rate(0, 0.1)


def test_the_arithmetic_imports_neither_tinker_nor_mlx():
    code = (
        "import sys, textpolicy.tinker.datum, textpolicy.tinker.hparams; "
        "sys.exit(bool({'tinker', 'mlx', 'mlx_lm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
