"""Export of a trained run to the forms of other programs: ``textpolicy export``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..config.settings import LocalPath, Positional, Section, check_config
from ..errors import UserError
from .inference import Source, load
from .resume import saved_settings

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
    base: str | None = None
    """peft: folder or hub id of the base that peft is to load; the run's own model if not given."""
    model: str | None = None
    """Built-in name, folder, .gguf file or hub id; instead of a run."""
    adapter: LocalPath | None = None
    """Adapter folder for the model."""
    threads: Annotated[int, Field(ge=0)] = 0
    """BLAS threads on a Linux CPU; 0 leaves it to OpenBLAS."""


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
    if out.exists():
        raise UserError(f"{out} exists; choose another --out or remove it")
    if args.run is not None and check_config(saved_settings(args.run), str(args.run)).engine == "tinker":
        raise UserError(f"the adapter of {args.run} is kept by its Tinker server; export is for runs of --engine mlx")
    loaded = load(Source(run=args.run, model=args.model, adapter=args.adapter, threads=args.threads))
    from ..mlx import export as write
    from ..mlx.adapters.attach import attached
    from ..mlx.models import find_model

    model, name = loaded.engine.model, loaded.config.model if loaded.config else str(args.model)
    folder = find_model(name)
    match args.to:
        case "mlx" | "hf":
            bits = write.BITS[args.quant] if args.quant else None
            write.export_folder(model, folder, out, layout=args.to, dtype=args.dtype, bits=bits)
        case "peft":
            base = write.check_base(name, args.base)
            write.export_peft(model, folder, out, base, dtype=args.dtype or "float32")
        case "gguf":
            write.export_gguf(model, loaded.tokenizer, folder, out, quant=args.quant or "f16")
    files = [out] if out.is_file() else [file for file in out.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files) / 1e6
    line = f"wrote {out} ({size:.1f} MB); load it with: {HOW_TO_LOAD[args.to].format(path=str(out))}"
    record = attached(model) if args.to == "peft" else None
    if record is not None and record.quantised is not None:
        line += (
            f"\nit was trained on a base quantised to {record.quantised[0]} bits; on a base in floats its completions "
            "differ a little, and --to hf writes what was trained"
        )
    return line
