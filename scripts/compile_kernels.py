"""Compile the fused kernels ahead of time, without a GPU, and report the resources that they use.

    python scripts/compile_kernels.py --arch 90 --head_dim 32 --dtype bf16

Prints a Markdown table of registers per thread, shared memory per program, bytes spilled to local memory and the
instructions that warps issue for each image and head, for the plans that `ops` makes of BiFormer's maps. Exits with 1
if anything is spilled.

    python scripts/compile_kernels.py --arch 90 --head_dim 32 --dtype bf16 --map "14 x 14, top-16" --tile 32 64 2 1

compares another tile: tokens computed and streamed, warps, stages.
"""
import argparse
import itertools
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import training.startup  # before torch  # noqa: F401  # isort: skip
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ops import RegionGrid
from ops.impl.triton import kernels
from ops.impl.triton.tuning import Plan, Tile, choose_one_pass_tile, fits_one_pass, is_dense, make_plan

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TF32 = "tf32"  # float32 whose products are allowed to be tf32
ONE_PASS = "one_pass_gradients"
KERNELS = {
    "forward": kernels.forward_kernel,
    "query_gradient": kernels.query_gradient_kernel,
    "key_value_gradient": kernels.key_value_gradient_kernel,
    ONE_PASS: kernels.one_pass_gradients_kernel,
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
    """Registers per thread, bytes of shared memory per program, bytes of local memory per thread (spills).

    And instructions: those of the loop over the streamed tokens, and those before and after it.
    """
    registers: int
    shared: int
    spilled: int
    loop: int
    outside: int

    def instructions(self, plan: Plan, trips: float) -> float:
        """How many instructions the warps of all programs for one image and head issue."""
        return (self.outside + trips * self.loop) * plan.tiles * plan.tile.num_warps


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


def _count_instructions(sass: str) -> tuple[int, int]:
    """(Instructions of the largest loop, others), of the disassembly of a kernel."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", sass)]
    # What follows the last exit is a branch to itself, and padding.
    end = max(at for at, text in code if "EXIT" in text)
    jumps = [(at, re.search(r"\bBRA\S* (?:\S+ )*0x([0-9a-f]+)", text)) for at, text in code if at < end]
    loops = [(int(jump[1], 16), at) for at, jump in jumps if jump and int(jump[1], 16) < at]
    first, last = max(loops, key=lambda loop: loop[1] - loop[0], default=(end + 1, end))
    inside = sum(first <= at <= last for at, _ in code)
    return inside, sum(at <= end for at, _ in code) - inside


def _usage(cubin: bytes, shared: int) -> Usage:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", report)[1]) for name in ("REG", "STACK", "LOCAL"))
    return Usage(registers, shared, stack + local, *_count_instructions(sass))


def compile_kernel(kernel: str, arch: int, dtype: str, head_dim: int, plan: Plan) -> Usage:
    """Compile one kernel for compute capability `arch` / 10.

    Raises:
        RuntimeError: The compiler gives up.
    """
    source = _source(KERNELS[kernel], dtype, head_dim, plan)
    options = dict(num_warps=plan.tile.num_warps, num_stages=plan.tile.num_stages)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return _usage(compiled.asm["cubin"], compiled.metadata.shared)


def plan_of(kernel: str, name: str, head_dim: int, dtype: str, tile: Tile | None = None) -> Plan:
    """The plan of a kernel where queries and keys are one of `MAPS`."""
    grid, topk = MAPS[name]
    inverse = kernel == "key_value_gradient"
    if kernel == ONE_PASS:
        tile = tile or choose_one_pass_tile(grid.height * grid.width, head_dim)
    dtype = torch.float32 if dtype == TF32 else DTYPES[dtype]
    return make_plan(grid, grid, topk, inverse, is_dense(grid, grid, topk), head_dim, dtype, tile)


def is_launched(kernel: str, name: str, head_dim: int, dtype: str) -> bool:
    """Whether `ops` launches a kernel where queries and keys are one of `MAPS`.

    Where one pass computes all gradients the others are compiled too, to be compared with it.
    """
    grid, topk = MAPS[name]
    dtype = torch.float32 if dtype == TF32 else DTYPES[dtype]
    return kernel != ONE_PASS or (is_dense(grid, grid, topk) and fits_one_pass(grid, grid, head_dim, dtype))


def trips_of(name: str, plan: Plan) -> int:
    """How many tiles one of the programs streams: for the gradients of keys, if every region is chosen by `topk`."""
    grid, topk = MAPS[name]
    if plan.dense:
        return math.ceil(grid.height * grid.width / plan.tile.block_n)
    if plan.packed:
        return math.ceil(topk * grid.tokens_per_region / plan.tile.block_n)
    return topk * math.ceil(grid.tokens_per_region / plan.tile.block_n)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="compute capabilities times 10")
    parser.add_argument("--dtype", nargs="+", choices=[*DTYPES, TF32], default=[*DTYPES, TF32])
    parser.add_argument("--head_dim", type=int, nargs="+", default=[16, 24, 32, 40, 48, 64, 80, 96, 128])
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--map", nargs="+", choices=MAPS, default=list(MAPS))
    parser.add_argument("--tile", nargs=4, type=int, metavar=("M", "N", "WARPS", "STAGES"), help="instead of ops'")
    args = parser.parse_args(argv)

    print("| kernel | map | way | dtype | head_dim | sm | tile | warps | stages | registers | shared, KiB", end="")
    print(" | loop | outside | instructions per image and head | spilled, bytes |")
    print("|---" * 15 + "|")
    spilled = 0
    for kernel, name, dtype, head_dim, arch in itertools.product(
        args.kernel, args.map, args.dtype, args.head_dim, args.arch
    ):
        if not is_launched(kernel, name, head_dim, dtype):
            continue
        plan = plan_of(kernel, name, head_dim, dtype, Tile(*args.tile) if args.tile else None)
        usage = compile_kernel(kernel, arch, dtype, head_dim, plan)
        spilled += usage.spilled > 0
        way = "dense" if plan.dense else "packed" if plan.packed else "by list"
        tile = f"{plan.tile.block_m} x {plan.tile.block_n} | {plan.tile.num_warps} | {plan.tile.num_stages}"
        used = f"{usage.registers} | {usage.shared / 1024:.1f} | {usage.loop} | {usage.outside}"
        used += f" | {usage.instructions(plan, trips_of(name, plan)):.0f} | {usage.spilled}"
        print(f"| {kernel} | {name} | {way} | {dtype} | {head_dim} | {arch} | {tile} | {used} |", flush=True)
    print(f"\n{spilled} kernels spill" if spilled else "\nno kernel spills")
    return int(spilled > 0)


if __name__ == "__main__":
    sys.exit(main())
