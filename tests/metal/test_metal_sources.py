"""What the sources ask of a device: every branch by device is known and run by a test, and Metal supports the rest."""

import ast
from pathlib import Path

import pytest

import textpolicy

ROOT, TESTS = Path(textpolicy.__file__).parent, Path(__file__).parents[1]

ENGINE = "metal/test_metal_engine.py::test_a_mac_computes_what_a_cpu_does"
COMPILED = "metal/test_metal_compile.py::test_so_are_those_of_a_whole_model"
KERNELS = "metal/test_metal_kernels.py::test_updates_and_scores_are_those_of_the_plain_operations"
MEASURED = "metal/test_metal_kernels.py::test_a_users_own_loss_and_the_measured_memory_take_plain_operations_too"
BITS = "mlx/kernels/test_gathers.py::test_a_run_on_a_gpu_records_what_is_not_the_same_bit_for_bit"
RANKS = "devices/test_launch.py::test_a_mac_has_one_gpu_for_one_rank_and_its_ranks_share_its_memory"
LIMITS = "metal/test_metal_memory.py::test_the_limits_of_a_run_are_legal_and_leave_the_machine_the_rest"
SLOTS = "metal/test_metal_memory.py::test_the_slots_of_a_context_are_blocks_of_64"
OURS = "mlx/kernels/test_metal.py::test_attention_reads_prompts_and_own_slots_and_writes_the_new_keys_and_values"
STORED = "mlx/test_models.py::test_on_an_accelerator_weights_stay_as_they_are_stored"
SUMS = "mlx/kernels/test_scans.py::test_no_pass_on_a_gpu_lets_mlx_sum_along_an_axis_of_one_element"
TILES = "mlx/kernels/test_attention.py::test_a_gpu_without_kernels_of_ours_makes_long_gradients_in_tiles"
# where the sources ask for the device: what a Mac takes there, and a test that goes that way
BRANCHES = {
    "mlx/adapters/attach.py attach": ("LoRAs of any rank on experts", KERNELS),
    "mlx/decode/compiled_steps.py Steps.__init__": ("operations, unless told otherwise", ENGINE),
    "mlx/decode/compiled_steps.py Steps.chosen": ("our Metal kernels, if they draw what operations do", ENGINE),
    "mlx/decode/decoder.py decode": ("the next step is computed ahead", ENGINE),
    "mlx/decode/folded_weights.py copies": ("no copies of weights", ENGINE),
    "mlx/decode/sampling.py Sampler.__init__": ("a compiled sampler", ENGINE),
    "mlx/engine.py decode_patches": ("MLX's own products of experts", ENGINE),
    "mlx/engine.py MLXEngine.__init__": ("compiled gradients and optimiser", ENGINE),
    "mlx/engine.py MLXEngine.platform": ("the name of the GPU", ENGINE),
    "mlx/engine.py MLXEngine.sample": ("compiled steps", ENGINE),
    "mlx/kernels/attention.py _tiles": ("tiles of 2^24 scores", TILES),
    "mlx/kernels/attention.py most_kept": ("gradients of many scores in tiles", TILES),
    "mlx/kernels/attention.py tile_bytes": ("the memory of such a tile", TILES),
    "mlx/kernels/cuda.py can_attend": ("no CUDA", ENGINE),
    "mlx/kernels/cuda.py can_draw": ("no CUDA", ENGINE),
    "mlx/kernels/cuda.py is_default": ("no CUDA", ENGINE),
    "mlx/kernels/cuda.py is_nvidia": ("no CUDA", ENGINE),
    "mlx/kernels/exponentials.py on_cpu": ("MLX's own exponential, attention and SwiGLU", ENGINE),
    "mlx/kernels/gathers.py patches": ("gathers whose gradients add in order", ENGINE),
    "mlx/kernels/gathers.py take_rows": ("gathers whose gradients add in order", ENGINE),
    "mlx/kernels/gathers.py unsteady": ("names what may differ in last bits", BITS),
    "mlx/kernels/masks.py SharedMasks.__call__": ("gradients of many scores in tiles", TILES),
    "mlx/kernels/masks.py patches": ("masks that all layers share", ENGINE),
    "mlx/kernels/metal.py can_attend": ("our Metal kernel, for heads that fit", OURS),
    "mlx/kernels/metal.py can_draw": ("our Metal kernel", OURS),
    "mlx/kernels/metal.py is_default": ("our Metal kernels", ENGINE),
    "mlx/kernels/plain.py plain_operations": ("mlx-lm's operations under a gradient", KERNELS),
    "mlx/kernels/plain.py refuse_kernels_alone": ("a sentence for BitNet and Muse Spark", KERNELS),
    "mlx/kernels/scans.py patches": ("no sums along an axis of one element", SUMS),
    "mlx/memory.py Costs.measure": ("no work ahead", "mlx/test_memory.py::test_costs_are_measured_with_no_work_ahead"),
    "mlx/memory.py Costs.decode": ("steps that share prompts", "mlx/test_memory.py::test_decoding_on_a_gpu"),
    "mlx/memory.py Costs.update": ("a wider margin", MEASURED),
    "mlx/collectives.py _machine": ("ranks of a machine share its memory", RANKS),
    "mlx/collectives.py backend": ("a Mac has one GPU", RANKS),
    "mlx/memory.py _learning": ("compiled passes are measured, too", MEASURED),
    "mlx/memory.py _peaks": ("the least of two passes", MEASURED),
    "mlx/memory.py limit_memory": ("a wired limit and a smaller cache", LIMITS),
    "mlx/memory.py usable_memory": ("0.9 of Metal's working set", LIMITS),
    "mlx/models.py load_model": ("weights as they are stored", STORED),
    "mlx/probe.py describe_mlx": ("gpu", ENGINE),
    "mlx/read/sizes.py slot_block": ("slots in blocks of 64", SLOTS),
    "mlx/score/logprobs.py tokens_at_once": ("2^24 logits at once", COMPILED),
}


def named(node):
    """Return the dotted name that ``node`` is, "" for other expressions."""
    if isinstance(node, ast.Attribute):
        return f"{named(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def uses(tree, where=""):
    """Yield the dotted names in ``tree``, each with the function or class that it stands in, and the call, if any."""
    for node in ast.iter_child_nodes(tree):
        inside = where
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            inside = f"{where}.{node.name}".strip(".")
        elif isinstance(node, ast.Call):
            yield named(node.func), where, node
        elif isinstance(node, ast.Attribute):
            yield named(node), where, None
        yield from uses(node, inside)


USES = [
    (path.relative_to(ROOT).as_posix(), *use)
    for path in sorted(ROOT.rglob("*.py"))
    for use in uses(ast.parse(path.read_text()))
]


def test_every_branch_by_device_is_in_the_table_and_run_by_a_test():
    asked = ("default_device", "metal.is_available", "is_default", "is_nvidia")
    found = {f"{path} {where}" for path, name, where, _ in USES if name.endswith(asked)}
    assert found == set(BRANCHES)
    for _, test in BRANCHES.values():
        path, name = test.split("::")
        assert f"def {name}" in (TESTS / path).read_text(), test


def test_cuda_is_for_its_kernels_alone_and_of_metal_only_its_presence_is_asked():
    for path, name, where, _ in USES:
        assert "cuda_kernel" not in name or path.startswith("mlx/kernels/"), (path, where)
        assert not name.startswith("mx.metal.") or name == "mx.metal.is_available", (path, where, name)


def test_nothing_that_metal_lacks_is_asked_of_mlx():
    """Metal has no numbers of eight bytes with a point, and MLX's linear algebra runs on a CPU only."""
    for path, name, where, call in USES:
        assert name != "mx.float64", (path, where)
        assert "float64" not in name or not path.startswith("mlx/"), (path, where)
        streams = [named(k.value) for k in call.keywords if k.arg == "stream"] if call is not None else []
        assert call is None or not name.startswith("mx.linalg.") or streams == ["mx.cpu"], (path, where, name)


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("def f():\n    return mx.fast.cuda_kernel('a')", {"mx.fast.cuda_kernel"}),
        ("class A:\n    x = mx.metal.device_info()", {"mx.metal.device_info"}),
        ("y = mx.linalg.svd(x, stream=mx.cpu)", {"mx.linalg.svd", "mx.cpu"}),
        ("if cuda.is_default() or mx.default_device() != mx.gpu: pass", {"cuda.is_default", "mx.default_device"}),
        ("from .cuda import is_default\nis_default()", {"is_default"}),
    ],
)
def test_the_search_sees_what_it_looks_for(line, names):
    assert names <= {name for name, _, _ in uses(ast.parse(line))}
