"""Run Metal kernels without a Mac: the source as MLX generates it, compiled as C++ and checked for stray accesses."""

import hashlib
import re
import shutil
import subprocess
from itertools import count
from pathlib import Path

import mlx.core as mx
import numpy as np

COMPILER = shutil.which("g++")
_HERE = Path(__file__).parent
_FLAGS = "-std=c++14 -O1 -fsanitize=address,undefined -fno-sanitize-recover -Wno-attributes -Wno-unknown-pragmas"


class Emulator:
    """Stands in for ``mx.fast.metal_kernel``; what it compiles and passes to the programs goes into ``folder``."""

    def __init__(self, folder: Path):
        self.folder, self.numbers = folder, count()
        self.machine, self.real = folder / "machine.o", mx.fast.metal_kernel

    def metal_kernel(self, *definition, **options):
        kernel = self.real(*definition, **options)

        def call(*, inputs, output_shapes, output_dtypes, **launch):
            def traced(*arrays):
                shapes = {"output_shapes": output_shapes, "output_dtypes": output_dtypes}
                return kernel(inputs=list(arrays), **shapes, **launch)

            parts = []
            mx.export_function(parts.append, traced, *inputs)  # MLX writes the source where it cannot run it either
            _, source, *sizes, infos, contiguous = next(
                p["arguments"][:10] for p in parts if p.get("name") == "CustomKernel"
            )
            assert contiguous
            buffers = []
            for a, (shape, strides, ndim) in zip(inputs, infos, strict=True):
                assert not strides
                assert not ndim
                buffers.append(_bytes(a))
                if shape:
                    buffers.append(np.array(a.shape, np.int32))
            empty = [
                np.full(int(np.prod(s)) * d.size, 0xFF, np.uint8)
                for s, d in zip(output_shapes, output_dtypes, strict=True)
            ]
            written = self.run(source, [*buffers, *empty], sizes)
            for buffer, new in zip(buffers, written, strict=False):  # a kernel may write into what it reads
                buffer.view(np.uint8).reshape(-1)[:] = np.frombuffer(new, np.uint8)
            results = zip(written[len(buffers) :], output_shapes, output_dtypes, strict=True)
            return [mx.array(np.frombuffer(new, np.uint8)).view(d).reshape(s) for new, s, d in results]

        return call

    def run(self, source, buffers, sizes):
        """Return the bytes of all buffers after the kernel has run."""
        program, where = self.compiled(source, len(buffers)), self.folder / f"run{next(self.numbers)}"
        where.mkdir()
        for i, buffer in enumerate(buffers):
            (where / str(i)).write_bytes(buffer.tobytes())
        command = [program, where, *map(str, sizes)]
        done = subprocess.run(command, capture_output=True, text=True, env={"ASAN_OPTIONS": "detect_leaks=0"})
        if done.returncode:
            raise RuntimeError(done.stderr)
        return [(where / str(i)).read_bytes() for i in range(len(buffers))]

    def compiled(self, source, buffers):
        """Return the program that runs the kernel of MLX's ``source``."""
        if not self.machine.exists():
            _compile("-c", _HERE / "metal_emulator.cpp", "-o", self.machine)
        program = self.folder / hashlib.sha256(source.encode()).hexdigest()[:20]
        if not program.exists():
            name = re.search(r"decltype\((.*)\) ", source)[1]
            places = re.findall(r"^ +\w+ (\w+) \[\[\1\]\]", source, re.MULTILINE)
            given = ", ".join([*(f"b[{i}]" for i in range(buffers)), *(f"place.{p}" for p in places)])
            call = f"void machine::kernel(const Any* b, const Place& place) {{ {name}({given}); }}"
            body = re.sub(r"^( *)threadgroup (\w+) (.*);$", _shared, source, flags=re.MULTILINE)
            text = program.with_suffix(".cpp")
            text.write_text(f'#include "metal_emulator.h"\n{body}\n{call}\n')
            _compile("-I", _HERE, text, self.machine, "-o", program)
        return program


def _compile(*arguments):
    done = subprocess.run([COMPILER, *_FLAGS.split(), *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def _shared(declaration):
    space, kind, arrays = declaration.groups()
    names = re.sub(r"\[[^\]]*\]", "", arrays).split(", ")
    return f"{space}static {kind} {arrays}; " + " ".join(f"machine::fresh({name});" for name in names)


def _bytes(array):
    """Return the array's own memory; that of a copy if it is not contiguous, which MLX copies as well."""
    mx.eval(array)
    seen = np.array(array.view(mx.uint16) if array.itemsize == 2 else array, copy=False)
    return seen if seen.flags.c_contiguous else seen.copy()
