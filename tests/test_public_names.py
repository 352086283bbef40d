"""The documented names resolve, and importing costs only what is used."""

import ast
import graphlib
import importlib
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import textpolicy

ROOT = Path(textpolicy.__file__).parent
NAMES = [
    "reward", "verifier", "length_reward", "keyword_reward", "perplexity_reward", "accuracy_reward",
    "load_model", "create_policy", "encode", "decode", "generate_tokens",
    "TextGenerationEnv", "RolloutRunner", "create_strategy", "Buffer", "Trainer",
    "compute_advantages", "compute_advantages_dr_grpo", "policy_loss", "compute_metrics", "validate_installation",
    "compute_advantages_maxrl", "policy_loss_sequence", "policy_loss_token", "create_gspo_policy_loss",
    "select_all_data", "select_recent_data", "select_informative_data", "filter_informative_prompts",
    "compute_prompt_group_stats", "compute_token_entropy", "apply_entropy_weighting", "compute_advantages_gtpo",
    "compute_gtpo_shaped_rewards", "normalize_gtpo_advantages", "gtpo_loss", "SEPAController",
    "build_gtpo_transform", "build_gtpo_hicra_transform", "identify_planning_tokens",
    "compute_length_penalty", "apply_length_shaping", "compute_length_shaping_stats",
    "apply_hicra_amplification", "boost_entropy_with_planning",
    "apply_lora", "freeze_base", "extract_params", "merge_weights", "create_lora_setup", "create_qlora_setup",
    "save_adapters", "reload_model", "create_reloadable_policy", "create_auto_reload_setup",
    "TextGenerationEnvironment", "RolloutCoordinator",
]  # fmt: skip
PATHS = {
    "textpolicy.algorithms": ["grpo"],
    "textpolicy.algorithms.grpo": [
        "compute_advantages", "compute_advantages_dr_grpo", "policy_loss", "compute_metrics",
        "compute_advantages_maxrl", "select_recent_data", "select_all_data", "select_informative_data",
        "filter_informative_prompts", "compute_prompt_group_stats", "compute_token_entropy",
        "apply_entropy_weighting", "compute_advantages_gtpo", "compute_gtpo_shaped_rewards",
        "normalize_gtpo_advantages", "gtpo_loss",
    ],
    "textpolicy.algorithms.gspo": [
        "policy_loss_sequence", "policy_loss_token", "create_gspo_policy_loss",
        "compute_sequence_importance_weights", "compute_metrics_sequence",
    ],
    "textpolicy.analysis": [
        "evaluate_sepa_significance", "build_sepa_significance_markdown", "evaluate_sepa_litmus",
        "build_litmus_markdown", "get_sepa_litmus_profile", "load_emergence_run_stats", "aggregate_group_stats",
        "compare", "compare_arms", "EmergenceLogger", "load_run",
    ],
    "textpolicy.buffer": ["Buffer", "Episode"],
    "textpolicy.environment": [
        "Environment", "TextGenerationEnv", "TextGenerationEnvironment", "MultiTurnEnv", "ToolEnv",
        "register_task_suite", "list_task_suites", "get_task_suite", "TextGenerationTask",
        "VectorizedEnvironment", "make_vectorized_env", "GymAdapter", "GymnasiumTextEnv",
    ],
    "textpolicy.environment.text_generation": [
        "TextGenerationEnv", "TextGenerationEnvironment", "TextGenerationTask",
    ],
    "textpolicy.generation": ["load_model", "create_policy", "encode", "decode", "generate_tokens", "decode_token_ids"],
    "textpolicy.generation.lora": [
        "apply_lora", "freeze_base", "extract_params", "merge_weights", "create_lora_setup", "create_qlora_setup",
    ],
    "textpolicy.generation.reload": [
        "save_adapters", "reload_model", "create_reloadable_policy", "create_auto_reload_setup",
    ],
    "textpolicy.generation.mlx_generation": [
        "load_model", "create_policy", "encode", "decode", "generate_tokens", "decode_token_ids",
    ],
    "textpolicy.rewards": ["reward", "verifier", "get_reward_function", "list_registered_functions", "RewardConfig"],
    "textpolicy.rewards.registry": ["reward", "verifier"],
    "textpolicy.rollout": ["RolloutRunner", "RolloutCoordinator", "create_strategy"],
    "textpolicy.rollout.runner": ["RolloutRunner"],
    "textpolicy.rollout.strategy": ["create_strategy"],
    "textpolicy.tinker.advantages": [
        "compute_grpo_advantages", "compute_maxrl_advantages", "apply_gtpo_weighting", "apply_hicra",
        "apply_sepa_pooling", "identify_planning_tokens", "DEFAULT_STRATEGIC_GRAMS", "SEPAController",
        "compute_composable_advantages",
    ],
    "textpolicy.training": ["Trainer", "build_gtpo_transform", "build_gtpo_hicra_transform"],
    "textpolicy.validate": ["validate_installation"],
}  # fmt: skip
MODULES = {path: path.relative_to(ROOT) for path in sorted(ROOT.rglob("*.py"))}


def run(script):
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


# names


def test_the_public_names_are_those_documented():
    assert sorted(textpolicy.__all__) == sorted(NAMES)
    assert {*NAMES, "__version__"} <= set(dir(textpolicy))


def test_every_public_name_resolves_to_the_object_of_that_name():
    for name in NAMES:
        assert getattr(textpolicy, name).__name__ == name


def test_every_documented_import_path_resolves():
    for path, names in PATHS.items():
        module = importlib.import_module(path)
        assert [name for name in names if not hasattr(module, name)] == [], path


def test_type_checkers_see_the_table_that_python_sees():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    [guard] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname: (node.module, alias.name) for node in guard.body if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }  # fmt: skip
    assert seen == {name: (module, name) for name, module in textpolicy._HOME.items()}


def test_the_version_is_that_of_the_installed_package():
    assert textpolicy.__version__ == version("textpolicy")


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'creat_policy'"):
        _ = textpolicy.creat_policy


# imports


def imports(path, types=True):
    """Yield (absolute module name, whether it runs on import) for every import; ``types`` includes those for types."""
    package = ["textpolicy", *MODULES[path].parent.parts]

    def visit(node, runs):
        for child in ast.iter_child_nodes(node):
            in_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing_only = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            if typing_only and not types:
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, runs) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                module = ".".join([*base, *([child.module] if child.module else [])])
                yield from ((f"{module}.{alias.name}", runs) for alias in child.names)
            else:
                yield from visit(child, runs and not in_function and not typing_only)

    return list(visit(ast.parse(path.read_text()), runs=True))


def within(name, *packages):
    return any(name == p or name.startswith(p + ".") for p in packages)


def outside(*folders):
    return [path for path, relative in MODULES.items() if relative.parts[0] not in folders]


def test_the_scan_sees_relative_absolute_and_deferred_imports():
    found = dict(imports(ROOT / "run" / "assembly.py"))
    assert found["textpolicy.mlx.engine.MLXEngine"] is False
    assert found["textpolicy.config.settings.Config"] is True
    assert found["json"] is True


def test_mlx_is_imported_by_the_engine_and_by_functions_that_return_its_arrays():
    guilty = {
        str(MODULES[path])
        for path in outside("mlx", "generation")
        for name, _ in imports(path)
        if within(name, "mlx", "mlx_lm")
    }
    assert guilty == {"training/flat.py", "rewards/batch.py"}


def test_the_mlx_package_is_imported_only_where_it_is_used():
    guilty = [
        (str(MODULES[path]), name) for path in outside("mlx", "generation") for name, runs in imports(path)
        if runs and within(name, "textpolicy.mlx", "textpolicy.generation", "textpolicy.training.flat")
        if path.name != "flat.py"
    ]  # fmt: skip
    assert guilty == []


def test_nothing_outside_the_tinker_package_imports_tinker():
    guilty = [(str(MODULES[p]), n) for p in outside("tinker") for n, _ in imports(p) if within(n, "tinker")]
    assert guilty == []


def test_the_mlx_and_tinker_packages_do_not_know_each_other():
    guilty = [
        (str(relative), name) for path, relative in MODULES.items() for name, _ in imports(path)
        if (relative.parts[0] == "mlx" and within(name, "textpolicy.tinker", "tinker"))
        or (relative.parts[0] == "tinker" and within(name, "textpolicy.mlx", "mlx", "mlx_lm"))
    ]  # fmt: skip
    assert guilty == []


def test_no_import_runs_up_the_tree_of_contributing():
    page = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = page.split("```text\ntextpolicy/\n")[1].split("```")[0].splitlines()
    named = [re.match(r"  ((?:\w+(?:/|\.py)\s+)+)", line + " ") for line in tree]
    place = {name.strip("/ ").removesuffix(".py"): n for n, row in enumerate(named) if row for name in row[1].split()}
    rooms = {relative.parts[0].removesuffix(".py") for relative in MODULES.values()} - {"__init__", "__main__"}
    assert set(place) == rooms
    upward = {
        (str(relative), name)
        for path, relative in MODULES.items()
        for name, _ in imports(path, types=False)
        if relative.parts[0].removesuffix(".py") in place
        if within(name, "textpolicy") and (target := name.split(".")[1]) in place
        if place[target] > place[relative.parts[0].removesuffix(".py")]
    }
    assert upward == set()


def test_no_room_and_no_file_imports_in_a_circle():
    modules = {".".join(["textpolicy", *r.with_suffix("").parts]).removesuffix(".__init__") for r in MODULES.values()}
    files, rooms = {}, {}
    for path, relative in MODULES.items():
        module = ".".join(["textpolicy", *relative.with_suffix("").parts]).removesuffix(".__init__")
        for name, _ in imports(path, types=False):
            target = name if name in modules else name.rpartition(".")[0]
            if target in modules and target != module:
                files.setdefault(module, set()).add(target)
                here, there = module.split(".")[1:2], target.split(".")[1:2]
                if here and there and here != there:
                    rooms.setdefault(here[0], set()).add(there[0])
    assert {"loop", "mlx", "run", "cli"} <= set(rooms)
    graphlib.TopologicalSorter(files).prepare()  # raises CycleError, which names the circle
    graphlib.TopologicalSorter(rooms).prepare()


def test_algorithms_need_numpy_and_the_package_core_only():
    allowed = ("numpy", "textpolicy.algorithms", "textpolicy.errors", "textpolicy.losses", "textpolicy.types")
    guilty = [
        (str(relative), name) for path, relative in MODULES.items() if relative.parts[0] == "algorithms"
        for name, _ in imports(path)
        if not within(name, *allowed) and name.split(".")[0] not in sys.stdlib_module_names
    ]  # fmt: skip
    assert guilty == []


def test_importing_textpolicy_loads_no_array_library():
    out = run(
        "import sys, textpolicy; print(*sorted({'numpy', 'mlx', 'mlx_lm', 'tinker', 'pydantic'} & {*sys.modules}))"
    )
    assert out.strip() == ""


def test_no_command_waits_for_scipy_stats():
    """It takes half a second and more, and what reads or makes a run needs none of its tests."""
    imported = "textpolicy.cli.main, textpolicy.run.training_run, textpolicy.report.page, textpolicy.doctor"
    assert run(f"import sys, {imported}; print('scipy.stats' in sys.modules)").strip() == "False"


def test_importing_textpolicy_takes_less_than_200_milliseconds_of_the_processor():
    script = "import time; t = time.process_time(); import textpolicy; print(time.process_time() - t)"
    assert min(float(run(script)) for _ in range(3)) < 0.2


def test_every_module_but_the_engines_imports_without_mlx_and_tinker():
    apart = {"mlx", "tinker", "generation"}
    names = [".".join(["textpolicy", *r.with_suffix("").parts]) for r in MODULES.values() if r.parts[0] not in apart]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith(("__main__", "training.flat"))]
    script = (
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        "print(*sorted({'mlx', 'mlx.core', 'mlx_lm', 'tinker'} & {*sys.modules}))"
    )
    assert run(script).strip() == ""
