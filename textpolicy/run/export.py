"""Taking a trained run elsewhere: what ``textpolicy export`` does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg

from ..config.settings import Section
from ..errors import UserError
from .inference import Source, load, read_run

Target = Literal["mlx", "hf", "peft", "gguf"]

QUANTS: dict[Target, tuple[str, ...]] = {"mlx": ("q4", "q8"), "hf": (), "peft": (), "gguf": ("f16", "q8_0")}
HOW_TO_LOAD: dict[Target, str] = {
    "mlx": "mlx_lm.load({path!r})",
    "hf": "transformers.AutoModelForCausalLM.from_pretrained({path!r})",
    "peft": "peft.AutoPeftModelForCausalLM.from_pretrained({path!r})",
    "gguf": "textpolicy generate --model {path} PROMPT",
}


class ExportArguments(Section):
    """Write a trained run, or a model, in the form that other programs load."""

    run: CliPositionalArg[Path | None] = None
    """Folder of a run: its model and adapter."""
    to: Target
    """mlx, hf: the merged model as a folder for mlx-lm, for transformers; peft: the adapter alone; gguf: one file."""
    out: Path | None = None
    """What to write; RUN/export/ and the name of the form if not given."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Of the numbers, not for gguf; what the base is stored in if not given, and float32 for peft."""
    quant: Literal["q4", "q8", "f16", "q8_0"] | None = None
    """mlx: q4 or q8 (none if not given); gguf: f16 (if not given) or q8_0."""
    base: str | None = None
    """peft: folder or hub id that peft shall load the adapter on; the run's own model if not given."""
    model: str | None = None
    """Built-in name, folder, .gguf file or hub id; instead of a run."""
    adapter: Path | None = None
    """Adapter folder for the model."""
    threads: Annotated[int, Field(ge=0)] = 0
    """BLAS threads on a Linux CPU; 0 leaves it to OpenBLAS."""


def export(asked: ExportArguments) -> str:
    """Write what was asked for, whole or not at all, and return a line that says how to load it."""
    _check(asked)
    out = _out(asked)
    if out.exists():
        raise UserError(f"{out} exists; choose another --out or remove it")
    if asked.run is not None and read_run(asked.run).engine == "tinker":
        raise UserError(f"the adapter of {asked.run} is kept by its Tinker server; export is for runs of --engine mlx")
    loaded = load(Source(run=asked.run, model=asked.model, adapter=asked.adapter, threads=asked.threads))
    name = loaded.config.model if loaded.config else str(asked.model)
    _write(asked, loaded.engine.model, loaded.tokenizer, name, out)
    how = HOW_TO_LOAD[asked.to].format(path=str(out))
    return f"wrote {out} ({_megabytes(out):.1f} MB); load it with: {how}{_remark(asked, loaded.engine.model)}"


def _remark(asked: ExportArguments, model: Any) -> str:
    """What is not the same over there."""
    from ..mlx.adapters.attach import attached

    record = attached(model) if asked.to == "peft" else None
    if record is None or record.quantised is None:
        return ""
    return (
        f"\nit was trained on a base quantised to {record.quantised[0]} bits; on one in floats it says something a "
        "little different, and --to hf writes what was trained"
    )


def _check(asked: ExportArguments) -> None:
    """Raise UserError for settings that do not go together."""
    if (asked.run is None) == (asked.model is None):
        raise UserError("give either a RUN or --model NAME, not both or neither")
    if asked.quant is not None and asked.quant not in QUANTS[asked.to]:
        known = ", ".join(f"{to} ({', '.join(quants)})" for to, quants in QUANTS.items() if quants)
        raise UserError(f"--quant {asked.quant} is nothing for --to {asked.to}; it is for {known}")
    if asked.dtype is not None and asked.to == "gguf":
        raise UserError(f"--dtype {asked.dtype} is nothing for --to gguf; give --quant f16 or q8_0")
    if asked.base is not None and asked.to != "peft":
        raise UserError(f"--base {asked.base} is for --to peft alone; leave it out")


def _out(asked: ExportArguments) -> Path:
    if asked.out is not None:
        return asked.out
    if asked.run is None:
        raise UserError("--model has no run to write beside; say where with --out")
    name = asked.to if asked.quant is None else f"{asked.to}-{asked.quant}"
    return (
        asked.run
        / "export"
        / (f"{asked.run.resolve().name}-{asked.quant or 'f16'}.gguf" if asked.to == "gguf" else name)
    )


def _write(asked: ExportArguments, model: Any, tokenizer: Any, name: str, out: Path) -> None:
    from ..mlx import export as write
    from ..mlx.models import find_model

    folder = find_model(name)
    match asked.to:
        case "mlx" | "hf":
            bits = write.BITS[asked.quant] if asked.quant else None
            write.export_folder(model, folder, out, layout=asked.to, dtype=asked.dtype, bits=bits)
        case "peft":
            base = write.check_base(name, asked.base)
            write.export_peft(model, folder, out, base, dtype=asked.dtype or "float32")
        case "gguf":
            write.export_gguf(model, tokenizer, folder, out, quant=asked.quant or "f16")


def _megabytes(path: Path) -> float:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6
