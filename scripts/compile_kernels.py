"""Compile the fused kernels ahead of time, without a GPU, and report what they use of one.

    python scripts/compile_kernels.py --arch 80 90 --head_dim 32 64 --dtype bf16

Prints a Markdown table of registers per thread, shared memory per program and bytes spilled to local memory, for the
tile that `ops` chooses where regions are small and where they are large. Exits with 1 if anything is spilled.
"""
import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ops.impl.triton import kernels  # noqa: E402
from ops.impl.triton.tuning import Tile, choose_tile  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KERNELS = {
    "forward": kernels.forward_kernel,
    "query_gradient": kernels.query_gradient_kernel,
    "key_value_gradient": kernels.key_value_gradient_kernel,
}
# (tokens of a tile's region, tokens streamed past it): BiFormer's last routed stage at 224, and its first
TOKENS = {"small": (4, 64), "large": (64, 64)}
POINTERS = {"routes_ptr": "*i64", "members_ptr": "*i32", "bounds_ptr": "*i32", "lse_ptr": "*fp32", "delta_ptr": "*fp32"}


class Usage(NamedTuple):
    """Registers per thread, bytes of shared memory per program, bytes of local memory per thread (spills)."""
    registers: int
    shared: int
    spilled: int


def _source(kernel, dtype: str, head_dim: int, dense: bool, tile: Tile) -> ASTSource:
    """The kernel as it is launched on aligned tensors, such as the views of one packed projection."""
    constants = dict(
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        DENSE=dense,
        PRECISION="ieee",
    )
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, f"*{dtype}")
            aligned[(i,)] = [["tt.divisibility", 16]]
        elif name.endswith("_strides"):
            signature[name] = ("i32",) * 4
            aligned |= {(i, j): [["tt.divisibility", 16]] for j in range(4)}
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=aligned)


def _usage(cubin: bytes) -> Usage:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", report)[1]) for name in ("REG", "STACK", "LOCAL"))
    return Usage(registers, 0, stack + local)


def compile_kernel(kernel: str, arch: int, dtype: str, head_dim: int, dense: bool, tile: Tile) -> Usage:
    """Compile one kernel for compute capability `arch` / 10.

    Raises:
        triton.CompilationError, RuntimeError: It does not compile, or needs more shared memory than a program has.
    """
    source = _source(KERNELS[kernel], dtype, head_dim, dense, tile)
    options = dict(num_warps=tile.num_warps, num_stages=tile.num_stages)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return _usage(compiled.asm["cubin"])._replace(shared=compiled.metadata.shared)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="compute capabilities times 10")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--head_dim", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    args = parser.parse_args(argv)

    print("| kernel | way | regions | dtype | head_dim | sm | tile | warps | registers | shared, KiB | spilled, bytes |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    spilled = 0
    cases = itertools.product(args.kernel, (False, True), TOKENS.items(), args.dtype, args.head_dim, args.arch)
    for kernel, dense, (size, (own, streamed)), dtype, head_dim, arch in cases:
        if dense and size == "small":
            continue  # tiles of the whole map are large whatever the regions are
        tile = choose_tile(own, streamed, head_dim, DTYPES[dtype])
        usage = compile_kernel(kernel, arch, dtype, head_dim, dense, tile)
        spilled += usage.spilled > 0
        print(
            f"| {kernel} | {'dense' if dense else 'by list'} | {size} | {dtype} | {head_dim} | {arch} | {tile.block_m} x "
            f"{tile.block_n} | {tile.num_warps} | {usage.registers} | {usage.shared / 1024:.1f} | {usage.spilled} |",
            flush=True,
        )
    print(f"\n{spilled} kernels spill" if spilled else "\nno kernel spills")
    return int(spilled > 0)


if __name__ == "__main__":
    sys.exit(main())
