"""Builds the Triton kernels of generated code with ptxas, for a GPU that is not there.

``python kernels.py 90 FILE …`` prints a line of JSON: how many were built, and why the others were not.
"""

import json
import sys
import types
from pathlib import Path

import torch._inductor.runtime.triton_helpers as helpers
import torch._inductor.runtime.triton_heuristics as heuristics
import triton
from reading import kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

WARP = 32


def build(name: str, file: Path, architecture: int) -> None:
    """Compile the kernel in ``file`` with the first of its configurations; raises whatever the compiler does."""
    module = types.ModuleType(name)
    module.__file__ = str(file)
    exec(compile(file.read_text(), str(file), "exec"), module.__dict__)  # Triton reads the source from the file
    kernel = getattr(module, name)
    first, meta = kernel.configs[0], kernel.triton_meta
    constants = {}
    for argument, kind in meta["signature"].items():
        if kind == "constexpr":
            given = meta.get("constants", {}).get(argument)
            constants[argument] = first.kwargs.get(argument, given)
    attributes = meta.get("configs", [{}])[0]
    triton.compile(
        ASTSource(kernel.fn, meta["signature"], constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", architecture, WARP),
        options={"num_warps": first.num_warps, "num_stages": first.num_stages},
    )


def main() -> None:
    """Build the kernels of all files, each once."""
    architecture, files = int(sys.argv[1]), [Path(name) for name in sys.argv[2:]]
    for name in ("set_driver_to_gpu", "set_driver_to_cpu"):
        setattr(helpers, name, lambda: None)
    heuristics.triton_hash_with_backend = lambda: "none"
    sources = {(name, source) for file in files for name, source in kernels(file.read_text()).items()}
    n_built, failed = 0, {}
    for number, (name, source) in enumerate(sorted(sources)):
        file = files[0].parent / f"kernel_{architecture}_{number}.py"
        file.write_text(source)
        try:
            build(name, file, architecture)
            n_built += 1
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    print(json.dumps({"built": n_built, "failed": failed}))


if __name__ == "__main__":
    main()
