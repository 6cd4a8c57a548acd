"""Compile the fused kernels ahead of time, without a GPU, and report the resources that they use.

    python scripts/compile_kernels.py --arch 90 --head_dim 32 --dtype bf16

Prints a Markdown table of registers per thread, shared memory per program and bytes spilled to local memory, for the
plans that `ops` makes of BiFormer's maps. Exits with 1 if anything is spilled.
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

from ops import RegionGrid
from ops.impl.triton import kernels
from ops.impl.triton.tuning import Plan, is_dense, make_plan

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TF32 = "tf32"  # float32 whose products are allowed to be tf32
KERNELS = {
    "forward": kernels.forward_kernel,
    "query_gradient": kernels.query_gradient_kernel,
    "key_value_gradient": kernels.key_value_gradient_kernel,
}
# Map and top-k of BiFormer's routed stages at 224, and of the first and the last at 800 x 1333
MAPS = {
    "56 x 56, top-1": (RegionGrid.fit(56, 56), 1),
    "28 x 28, top-4": (RegionGrid.fit(28, 28), 4),
    "14 x 14, top-16": (RegionGrid.fit(14, 14), 16),
    "200 x 334, top-1": (RegionGrid.fit(200, 334, 16), 1),
    "50 x 84, top-16": (RegionGrid.fit(50, 84, 16), 16),
}
POINTERS = {
    **{"routes_ptr": "*i64", "bits_ptr": "*i64", "members_ptr": "*i32", "bounds_ptr": "*i32"},
    **{"lse_ptr": "*fp32", "delta_ptr": "*fp32"},
}


class Usage(NamedTuple):
    """Registers per thread, bytes of shared memory per program, bytes of local memory per thread (spills)."""
    registers: int
    shared: int
    spilled: int


def _source(kernel, dtype: str, head_dim: int, plan: Plan) -> ASTSource:
    """The kernel as it is launched on aligned tensors, such as the views of one packed projection of even heads."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    constants = dict(
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        PRECISION="tf32" if dtype == TF32 else "ieee",
        STRIDES_OF_8=head_dim % 8 == 0,
        **plan.constants(),
    )
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, f"*{'fp32' if dtype == TF32 else dtype}")
            aligned[(i,)] = [["tt.divisibility", 16]]
        elif name.endswith("_strides"):
            signature[name] = ("i32",) * 4
            # The head stride is the head size; the others are multiples of it, for an even number of heads those of 16.
            aligned |= {(i, j): [["tt.divisibility", 16]] for j in range(4 if head_dim % 16 == 0 else 3)}
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    places = {(i,): constants[name] for i, name in enumerate(kernel.arg_names) if name in constants}
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


def compile_kernel(kernel: str, arch: int, dtype: str, head_dim: int, plan: Plan) -> Usage:
    """Compile one kernel for compute capability `arch` / 10.

    Raises:
        RuntimeError: The compiler gives up.
    """
    source = _source(KERNELS[kernel], dtype, head_dim, plan)
    options = dict(num_warps=plan.tile.num_warps, num_stages=plan.tile.num_stages)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return _usage(compiled.asm["cubin"])._replace(shared=compiled.metadata.shared)


def plan_of(kernel: str, grid: RegionGrid, topk: int, head_dim: int, dtype: str, dense: bool) -> Plan:
    """The plan of a kernel where queries and keys are one map."""
    inverse = kernel == "key_value_gradient"
    return make_plan(grid, grid, topk, inverse, dense, head_dim, torch.float32 if dtype == TF32 else DTYPES[dtype])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="compute capabilities times 10")
    parser.add_argument("--dtype", nargs="+", choices=[*DTYPES, TF32], default=[*DTYPES, TF32])
    parser.add_argument("--head_dim", type=int, nargs="+", default=[16, 24, 32, 40, 48, 64, 80, 96, 128])
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--map", nargs="+", choices=MAPS, default=list(MAPS))
    args = parser.parse_args(argv)

    print("| kernel | map | way | dtype | head_dim | sm | tile | warps | registers | shared, KiB | spilled, bytes |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    spilled = 0
    for kernel, name, dtype, head_dim, arch in itertools.product(
        args.kernel, args.map, args.dtype, args.head_dim, args.arch
    ):
        grid, topk = MAPS[name]
        dense = is_dense(grid, grid, topk)
        plan = plan_of(kernel, grid, topk, head_dim, dtype, dense)
        usage = compile_kernel(kernel, arch, dtype, head_dim, plan)
        spilled += usage.spilled > 0
        way = "dense" if dense else "packed" if plan.packed else "by list"
        tile = f"{plan.tile.block_m} x {plan.tile.block_n} | {plan.tile.num_warps}"
        used = f"{usage.registers} | {usage.shared / 1024:.1f} | {usage.spilled}"
        print(f"| {kernel} | {name} | {way} | {dtype} | {head_dim} | {arch} | {tile} | {used} |", flush=True)
    print(f"\n{spilled} kernels spill" if spilled else "\nno kernel spills")
    return int(spilled > 0)


if __name__ == "__main__":
    sys.exit(main())
