"""The documented import path of ``textpolicy.loop.pass_at_k``, which evaluation uses too."""

from ..loop.pass_at_k import mean_pass_at_k as mean_pass_at_k
from ..loop.pass_at_k import mean_pass_hat_k as mean_pass_hat_k
from ..loop.pass_at_k import pass_at_k as pass_at_k
from ..loop.pass_at_k import pass_hat_k as pass_hat_k
from ..loop.pass_at_k import plug_in_pass_at_k as plug_in_pass_at_k
