"""Export of a trained run to the forms of other programs: ``textpolicy export``."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ..config.settings import LocalPath, ModelName, Positional, Section
from ..errors import UserError
from .inference import Source, choose, prepare

Target = Literal["mlx", "hf", "peft", "gguf"]

QUANTS: dict[Target, tuple[str, ...]] = {"mlx": ("q4", "q8"), "hf": (), "peft": (), "gguf": ("f16", "q8_0")}
HOW_TO_LOAD: dict[Target, str] = {
    "mlx": "mlx_lm.load({path!r})",
    "hf": "transformers.AutoModelForCausalLM.from_pretrained({path!r})",
    "peft": "peft.AutoPeftModelForCausalLM.from_pretrained({path!r})",
    "gguf": "textpolicy generate --model {quoted} PROMPT",
}


class ExportArguments(Section):
    """Write a trained run, or a model, in the form that other programs load."""

    run: Annotated[LocalPath | None, Positional] = None
    """Folder of a run: its model and adapter."""
    to: Target
    """mlx, hf: the merged model as a folder for mlx-lm, for transformers; peft: the adapter alone; gguf: one file."""
    out: LocalPath | None = None
    """Output path; RUN/export/ and the name of the form if not given."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Type of the numbers, not for gguf; that of the stored base if not given, and float32 for peft."""
    quant: Literal["q4", "q8", "f16", "q8_0"] | None = None
    """mlx: q4 or q8 (none if not given); gguf: f16 (if not given) or q8_0."""
    base: ModelName | None = None
    """peft: folder or hub id of the base that peft is to load; the run's own model if not given."""
    model: ModelName | None = None
    """Built-in name, folder, .gguf file or hub id; instead of a run."""
    adapter: LocalPath | None = None
    """Adapter folder for the model."""
    threads: Annotated[int, Field(ge=0)] = 0
    """BLAS threads on a Linux CPU; 0 leaves it to OpenBLAS."""


def refuse_unwritable(out: Path) -> None:
    """Raise UserError where ``out`` exists, or no file or folder of that name can be made."""
    try:
        if out.exists():
            raise UserError(f"{out} exists; choose another --out or remove it")
        above = next(folder for folder in out.absolute().parents if folder.exists())
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror}); choose another --out") from error
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {out} ({above} is not a folder to write to); choose another --out")


def export(args: ExportArguments) -> str:
    """Write what was asked for, complete or not at all, and return a line on how to load it."""
    if (args.run is None) == (args.model is None):
        raise UserError("give either a RUN or --model NAME, not both or neither")
    if args.quant is not None and args.quant not in QUANTS[args.to]:
        known = ", ".join(f"{to} ({', '.join(quants)})" for to, quants in QUANTS.items() if quants)
        raise UserError(f"--quant {args.quant} does not apply to --to {args.to}; use it with {known}")
    if args.dtype is not None and args.to == "gguf":
        raise UserError(f"--dtype {args.dtype} does not apply to --to gguf; give --quant f16 or q8_0")
    if args.base is not None and args.to != "peft":
        raise UserError(f"--base {args.base} applies to --to peft alone; leave it out")
    if args.out is not None:
        out = args.out
    elif args.run is None:
        raise UserError("--model has no run folder to write to; name the output with --out")
    elif args.to == "gguf":
        out = args.run / "export" / f"{args.run.resolve().name}-{args.quant or 'f16'}.gguf"
    else:
        out = args.run / "export" / (args.to if args.quant is None else f"{args.to}-{args.quant}")
    refuse_unwritable(out)
    chosen = choose(Source(run=args.run, model=args.model, adapter=args.adapter))
    if chosen.config is not None and chosen.config.engine == "tinker":
        raise UserError(f"the adapter of {args.run} is kept by its Tinker server; export is for runs of --engine mlx")
    from ..mlx import export as write
    from ..mlx.adapters.attach import attached
    from ..mlx.adapters.saving import read_adapter
    from ..mlx.models import find_model

    base = write.check_base(chosen.name, args.base) if args.to == "peft" else ""
    if args.to == "peft" and (chosen.adapter is None or read_adapter(chosen.adapter).is_full):
        raise UserError("the model has no adapter for --to peft to write; merge it with --to mlx, hf or gguf")
    folder = find_model(chosen.name)
    write.check_model(folder, args.to)
    tokenizer, load_engine = prepare(chosen, args.threads)
    model = load_engine().model
    match args.to:
        case "mlx" | "hf":
            bits = write.BITS[args.quant] if args.quant else None
            write.export_folder(model, folder, out, layout=args.to, dtype=args.dtype, bits=bits)
        case "peft":
            write.export_peft(model, folder, out, base, dtype=args.dtype or "float32")
        case "gguf":
            write.export_gguf(model, tokenizer, folder, out, quant=args.quant or "f16")
    files = [out] if out.is_file() else [file for file in out.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files) / 1e6
    how = HOW_TO_LOAD[args.to].format(path=str(out), quoted=shlex.quote(str(out)))
    line = f"wrote {out} ({size:.1f} MB); load it with: {how}"
    record = attached(model) if args.to == "peft" else None
    if record is not None and record.quantised is not None:
        line += (
            f"\nit was trained on a base quantised to {record.quantised[0]} bits; on a base in floats its completions "
            "differ a little, and --to hf writes what was trained"
        )
    return line
