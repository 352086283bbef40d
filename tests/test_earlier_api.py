"""What a user of version 0.1.11 may have written: arguments and defaults by name and place, keys of dicts, flags.

The table is of the names that its documentation and examples use; CHANGELOG.md says where a behaviour differs.
"""

import ast
import importlib
import inspect

import numpy as np
import pytest

import textpolicy as tp

# isort: split
import mlx.core as mx
import mlx.optimizers as optim
from conftest import tiny_llama
from toy_tokenizers import Letters

from textpolicy.algorithms import grpo, gspo
from textpolicy.campaign.presets import lr_sweep, sepa, tinker_math
from textpolicy.config.flags import parse
from textpolicy.errors import UserError
from textpolicy.rewards import RewardConfig, create_mlx_optimized_batch_processor, list_registered_functions
from textpolicy.run.train_math import TrainMathArguments

SIGNATURES = """
textpolicy.algorithms.grpo: compute_advantages(rewards)
textpolicy.algorithms.grpo: compute_advantages_dr_grpo(rewards)
textpolicy.algorithms.grpo: compute_advantages_maxrl(rewards, eps=1e-6, prompt_ids=None, num_prompt_groups=None)
textpolicy.algorithms.grpo: policy_loss(old_logprobs, new_logprobs, advantages, clip_ratio=None, clip_ratio_low=0.2, clip_ratio_high=0.28, normalize_constant=None)
textpolicy.algorithms.grpo: compute_metrics(old_logprobs, new_logprobs, advantages, clip_ratio=None, clip_ratio_low=0.2, clip_ratio_high=0.28)
textpolicy.algorithms.grpo: select_recent_data(buffer, max_episodes=100)
textpolicy.algorithms.grpo: select_all_data(buffer)
textpolicy.algorithms.grpo: apply_entropy_weighting(advantages, token_entropies, entropy_weight=0.1)
textpolicy.algorithms.grpo: compute_advantages_gtpo(rewards, token_entropies, entropy_weight=0.1, episode_lengths=None)
textpolicy.algorithms.grpo: normalize_gtpo_advantages(shaped_rewards, is_positive, eps=1e-8)
textpolicy.algorithms.gspo: policy_loss_sequence(old_logprobs, new_logprobs, advantages)
textpolicy.analysis: evaluate_sepa_significance(baseline_run_dirs, candidate_run_dirs, *, alpha=0.05, num_resamples=20000, seed=0)
textpolicy.analysis: evaluate_sepa_litmus(baseline_run_dirs, candidate_run_dirs, *, thresholds=None, evidence=None)
textpolicy.analysis: EmergenceLogger(output_dir, planning_config=None, strategic_grams=None, metadata_extractor=None, max_completion_tokens=None)
textpolicy.analysis: EmergenceLogger.log_step(step, episodes, tokenizer, examples=None, extra_step_metrics=None)
textpolicy.buffer: Buffer(max_episodes=100)
textpolicy.buffer: Buffer.add(obs, act, rew, next_obs, done, timeout=False, logprob=None, value=None, entropy=None, is_correct=None)
textpolicy.environment: TextGenerationEnv(prompts, reward_fn, max_tokens=25, seed=42, tokenizer=None, examples=None, group_size=1)
textpolicy.environment: TextGenerationEnvironment(model, tokenizer, task_suite='basic', num_episodes=50, generation_params=None, seed=42)
textpolicy.environment: TextGenerationTask(prompt, target_keywords, target_length_range, difficulty, category, evaluation_criteria)
textpolicy.environment: register_task_suite(name, loader)
textpolicy.environment: make_vectorized_env(env_id, num_envs=1, use_async=True, env_kwargs=None)
textpolicy.environment: Environment.render(mode='human')
textpolicy.generation: create_policy(model, tokenizer, generation_params=None)
textpolicy.generation: decode(tokenizer, tokens)
textpolicy.generation: encode(tokenizer, text)
textpolicy.generation: generate_tokens(model, tokenizer, prompt_tokens, max_tokens=50, temperature=0.7, top_p=0.9, repetition_penalty=1.1)
textpolicy.generation: load_model(model_path, adapter_path=None, tokenizer_config=None, verbose=False)
textpolicy.generation.lora: apply_lora(model, lora_layers=8, lora_rank=8, lora_scale=20.0, lora_dropout=0.0, lora_keys=None)
textpolicy.generation.lora: create_lora_setup(model, lora_config, auto_reload=True, adapter_save_path='./lora_adapters.safetensors')
textpolicy.generation.lora: create_qlora_setup(model, lora_config, quantization_config)
textpolicy.generation.reload: create_auto_reload_setup(model_path, adapter_save_path='./lora_adapters.safetensors')
textpolicy.generation.reload: create_reloadable_policy(base_model_path, initial_adapter_path, generation_params)
textpolicy.generation.reload: reload_model(base_model_path, adapter_path, tokenizer_config=None)
textpolicy.generation.reload: save_adapters(model, adapter_path)
textpolicy.rewards: RewardConfig(name, weight=1.0, params=None, verifiers=None, verifier_penalty=0.0)
textpolicy: length_reward(prompt, completion, example, target_length=50, tolerance=0.2)
textpolicy: keyword_reward(prompt, completion, example, keywords=None, bonus_multiplier=1.0)
textpolicy: perplexity_reward(prompt, completion, example, model=None, max_perplexity=100.0)
textpolicy: accuracy_reward(prompt, completion, example, ground_truth=None, similarity_threshold=0.7)
textpolicy: compute_length_penalty(sequence_length, max_length, cache_length=100, max_penalty=0.5)
textpolicy: compute_length_shaping_stats(sequence_lengths, max_length, cache_length=100)
textpolicy: apply_hicra_amplification(advantages, planning_mask, alpha=0.2)
textpolicy: boost_entropy_with_planning(token_entropies, planning_mask, gamma=0.3)
textpolicy: validate_installation(verbose=True)
textpolicy.rollout: RolloutRunner(env, policy=None, strategy=None, max_steps=1000, agent=None, profile=False)
textpolicy.rollout: RolloutRunner.collect_batched(batched_policy_fn, batch_size)
textpolicy.rollout: RolloutRunner.collect_episode(deterministic=False)
textpolicy.rollout: RolloutCoordinator(env_fn, policy_fn, algorithm, num_workers=0, max_steps=1000, max_episodes=100, batch_size=1, model=None, tokenizer=None, generation_params=None, profile=False)
textpolicy.rollout: create_strategy(algorithm)
textpolicy.tasks.countdown: generate_countdown_problems(num_problems, num_numbers=4, number_range=(1, 25), target_range=(10, 100), ensure_solvable=True, seed=None, max_attempts=None)
textpolicy.tasks.countdown: format_countdown_prompt(target, numbers)
textpolicy.training: Trainer(model, advantage_fn, loss_fn, optimizer, get_logprobs_fn=None, metrics_fn=None, max_grad_norm=0.5, compile_training='auto', gradient_checkpointing=False, micro_batch_size=None, buffer=None, data_selector_fn=None, auto_save_lora=None, metrics_interval=10, advantage_transform_fn=None, advantage_reward_key='rewards', profile=False, on_policy=True)
textpolicy.training: Trainer.train(rollout_data=None)
textpolicy.training: Trainer.train_epoch(coordinator, num_steps=1)
textpolicy.training: Trainer.link_buffer(buffer, data_selector_fn=None)
textpolicy.training: build_gtpo_hicra_transform(tokenizer, *, strategic_grams=None, hicra_alpha=0.2, entropy_weight=0.1)
textpolicy.training: build_gtpo_transform(*, alpha_1=1.0, alpha_2=0.1, reward_threshold=0.5, tokenizer=None, strategic_grams=None, hicra_gamma=0.0, sepa_steps=0, sepa_schedule='linear', sepa_delay_steps=0, sepa_correct_rate_gate=0.0, use_maxrl_base=False)
textpolicy: SEPAController(*, sepa_steps=0, sepa_schedule='linear', sepa_delay_steps=0, sepa_correct_rate_gate=0.0, sepa_ema_decay=0.99, sepa_var_threshold=0.2, sepa_warmup=50, eps=1e-8)
textpolicy.tinker.advantages: apply_gtpo_weighting(advantage, entropies, beta=0.1)
textpolicy.tinker.advantages: apply_hicra(token_advs, planning_mask, alpha=0.2)
textpolicy.tinker.advantages: apply_sepa_pooling(entropies, planning_mask, lambda_t)
textpolicy.tinker.advantages: compute_maxrl_advantages(rewards, eps=1e-6)
"""  # noqa: E501 - a signature a line


@pytest.mark.parametrize("line", SIGNATURES.strip().splitlines())
def test_a_call_of_the_earlier_version_is_understood(line):
    path, written = line.split(": ", 1)
    call = written.partition("(")[0]
    ours = importlib.import_module(path)
    for part in call.split("."):
        ours = getattr(ours, part)
    spec = ast.parse(f"def f({written.partition('(')[2]}: ...").body[0].args
    defaults = [None] * (len(spec.args) - len(spec.defaults)) + spec.defaults
    known = inspect.signature(ours).parameters
    places = [p.name for p in known.values() if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]
    assert places[: len(spec.args)] == [a.arg for a in spec.args]
    for argument, default in [
        *zip(spec.args, defaults, strict=True),
        *zip(spec.kwonlyargs, spec.kw_defaults, strict=True),
    ]:
        if default is not None:
            found, wanted = known[argument.arg].default, ast.literal_eval(default)
            assert found == wanted or (wanted is None and repr(found) in ("()", "<factory>")), argument.arg


@pytest.fixture(scope="module")
def stepped():
    """A step of training on two prompts, as the quickstart takes it: its answers, its buffer, its result."""

    def reward(prompt, completion, example, **_):
        return {"reward": float(len(completion) % 2), "is_correct": len(completion) > 3}

    model, letters = tiny_llama(128, layers=1), Letters()
    letters.eos_token_id = 3
    tp.create_lora_setup(model, {"lora_layers": 1, "lora_rank": 2, "lora_scale": 4.0, "lora_dropout": 0.0})
    env = tp.TextGenerationEnv(["ab", "c"], reward, max_tokens=4, tokenizer=letters, group_size=4)
    policy = tp.create_policy(model, letters, {"max_tokens": 4, "temperature": 1.0, "decode_backend": "mlx"})
    runner = tp.RolloutRunner(env, policy=policy, strategy=tp.create_strategy("grpo"), max_steps=8, profile=True)
    buffer = runner.collect()
    step = {**env.step([97])} if env.reset() else {}
    trainer = tp.Trainer(
        model, grpo.compute_advantages, grpo.policy_loss, optim.Adam(1e-3), None, grpo.compute_metrics, buffer=buffer,
        data_selector_fn=grpo.select_recent_data, profile=True,
    )  # fmt: skip
    data = grpo.select_recent_data(buffer)
    episodes = list(buffer.episodes)
    return step, env.reset()[1], runner, data, episodes, trainer.train()


KEYS = {
    "step": {"observation", "reward", "terminated", "truncated", "info"},
    "info": {"response", "reward", "prompt", "episode", "is_correct"},
    "reset": {"episode", "prompt_index", "max_tokens", "prompt_text"},
    "timing": {"total", "env_reset", "generation", "env_step", "buffer_store"},
    "data": {
        "obs", "act", "logprob", "rewards", "binary_rewards", "episode_lengths", "prompt_lengths", "prompt_ids",
        "num_prompt_groups",
    },
    "episode": {"obs", "act", "rew", "next_obs", "done", "timeout", "logprob", "is_correct"},
    "result": {
        "loss", "step", "grad_norm", "mean_advantage", "std_advantage", "min_advantage", "max_advantage", "mean_ratio",
        "clip_fraction", "clip_fraction_lower", "clip_fraction_upper", "kl_divergence", "clip_ratio_low",
        "clip_ratio_high", "timing/total_s",
    },
    "lora": {"total_parameters", "estimated_lora_parameters", "memory_ratio", "memory_savings_percent"},
    "qlora": {
        "total_parameters", "estimated_lora_parameters", "memory_ratio", "memory_savings_percent",
        "quantization_factor", "total_memory_savings",
    },
    "groups": {
        "num_prompts", "num_episodes", "completions_per_prompt", "reward_variance_mean", "reward_variance_std",
    },
    "filter": {
        "prompts_kept", "prompts_dropped_all_correct", "prompts_dropped_all_wrong", "prompts_dropped_single",
        "prompts_kept_single", "episodes_kept", "episodes_dropped", "filter_rate",
    },
    "length": {"mean_length", "max_length_observed", "truncation_rate", "penalty_zone_rate"},
    "validate": {"status", "checks", "errors"},
    "checks": {"mlx", "gymnasium", "mlx_lm", "environment_contract"},
}  # fmt: skip


def test_every_key_that_was_returned_is_returned(stepped):
    step, reset, runner, data, episodes, result = stepped
    report = tp.validate_installation(verbose=False)
    lora = {"lora_layers": 1, "lora_rank": 2}
    found = {
        "step": step,
        "info": step["info"],
        "reset": reset,
        "timing": runner.get_timing(),
        "data": data,
        "episode": episodes[0].to_dict(),
        "result": result,
        "lora": tp.create_lora_setup(tiny_llama(64), lora)[1],
        "qlora": tp.create_qlora_setup(tiny_llama(64), lora, {"bits": 4, "group_size": 32})[1],
        "groups": grpo.compute_prompt_group_stats(episodes),
        "filter": grpo.filter_informative_prompts(episodes, min_variance=0.01, keep_single_completion=True)[1],
        "length": tp.compute_length_shaping_stats(sequence_lengths=[3, 4], max_length=4),
        "validate": report,
        "checks": report["checks"],
    }
    assert {name: KEYS[name] - {*values} for name, values in found.items() if KEYS[name] - {*values}} == {}
    assert found.keys() == KEYS.keys()


def test_what_was_returned_has_its_place_and_type(stepped):
    step, _, _, _, episodes, _ = stepped
    assert [type(step[name]) for name in ("reward", "terminated", "truncated", "info")] == [float, bool, bool, dict]
    episode = episodes[0]
    assert (type(episode.act[0]), len(episode.logprob[0])) == (list, len(episode.act[0]))
    assert {*list_registered_functions()} == {"rewards", "verifiers"}
    ratios = gspo.compute_sequence_importance_weights(np.zeros(3), np.zeros(3), [2, 1])
    assert np.array(ratios).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("key", ["decode_backend", "decode_backend_options", "profile_decode_stats"])
def test_settings_of_the_earlier_decoders_change_nothing_and_say_so(key, caplog):
    letters = Letters()
    letters.eos_token_id = 3
    policy = tp.create_policy(tiny_llama(64), letters, {"max_tokens": 2, key: {}})
    ids, extras = policy(mx.array([5, 6]), deterministic=True)
    assert len(ids) == len(extras["logprob"])
    assert key in caplog.text


@pytest.mark.parametrize(
    ("kind", "name", "instead"),
    [
        (tp.buffer.Buffer, "sample_sequences", "sample_episodes"),
        (tp.buffer.Buffer, "print_state", "episode_count"),
        (tp.RolloutRunner, "collect_rollout", r"collect\(\)"),
        (tp.RolloutRunner, "get_statistics", r"collect\(\)"),
        (tp.Trainer, "get_metrics", r"train\(\)"),
        (tp.Trainer, "reset_metrics", r"train\(\)"),
        (tp.Trainer, "reset_timer", r"train\(\)"),
    ],
)
def test_a_method_that_is_gone_says_what_to_call_instead(kind, name, instead):
    with pytest.raises(UserError, match=rf"^{kind.__name__}\.{name} of version 0.1 is gone; .*{instead}"):
        getattr(object.__new__(kind), name)(4, 2, recent_first=False)
    assert hasattr(kind, instead.partition("\\")[0])


def test_an_epoch_is_as_many_steps_on_what_the_coordinator_collects():
    class Handed:
        collect = staticmethod(lambda: [1, 2])

    trainer = object.__new__(tp.Trainer)
    trainer.train = lambda data: {"loss": sum(data)}
    assert trainer.train_epoch(Handed, 3) == [{"loss": 3}] * 3
    with pytest.raises(UserError, match="num_steps is 0"):
        trainer.train_epoch(Handed, 0)


def test_lists_that_were_optional_may_be_none():
    config = RewardConfig("length_reward", 1.0, None, None, 0.0)
    assert float(create_mlx_optimized_batch_processor([config])(["?"], ["a b"], [{}])[0]) < 1


def test_log_probs_of_ones_own_are_refused_in_a_sentence():
    with pytest.raises(UserError, match="get_logprobs_fn is given"):
        tp.Trainer(tiny_llama(64), grpo.compute_advantages, grpo.policy_loss, optim.Adam(1e-3), lambda *_: None)


FLAGS = {
    TrainMathArguments: """model=Qwen/Qwen3-4B-Instruct-2507 base_url=None lora_rank=32 algorithm=None max_steps=500
        batch_size=8 group_size=16 max_tokens=2048 temperature=0.7 lr=4e-5 weight_decay=0.0 max_examples=None
        save_every=20 gtpo_beta=0.1 hicra_alpha=0.2 sepa_steps=500 sepa_schedule=linear sepa_delay_steps=50
        sepa_correct_rate_gate=0.1 strategic_grams=None log_dir=logs/tinker_math advantage_mode=None
        transform_mode=None""",
    tinker_math.MathCampaignArguments: """campaign_root=None execute=False continue_on_error=False base_url=None
        lora_rank=64 max_steps=100 batch_size=4 group_size=8 max_tokens=2048 temperature=0.7 lr=4e-5 baseline_lr=None
        candidate_lr=None max_examples=None save_every=20 gtpo_beta=0.1 hicra_alpha=0.2 sepa_steps=100
        sepa_schedule=linear sepa_delay_steps=10 sepa_correct_rate_gate=0.1 alpha=0.05 resamples=20000""",
    lr_sweep.SweepArguments: """sweep_root=None probe_steps=20 base_url=None lora_rank=64 batch_size=4 group_size=16
        max_tokens=2048 temperature=0.7 sepa_steps=100 sepa_schedule=linear sepa_delay_steps=10
        sepa_correct_rate_gate=0.1""",
    sepa.SEPACampaignArguments: """campaign_root=None execute=False continue_on_error=False steps=12 num_problems=16
        episodes_per_step=8 batch_size=8 max_tokens=128 temperature=0.4 lr=5e-6 baseline_hicra_gamma=0.3
        candidate_sepa_steps=8 candidate_sepa_delay_steps=0 candidate_sepa_correct_rate_gate=0.0
        litmus_min_run_pairs=0 alpha=0.05 resamples=20000""",
}


@pytest.mark.parametrize("kind", FLAGS)
def test_every_flag_of_the_earlier_scripts_has_its_default(kind):
    given = parse(kind, [], "script")
    for pair in FLAGS[kind].split():
        name, _, default = pair.partition("=")
        value = getattr(given, name)
        assert str(value) == default or value == float(default), name
