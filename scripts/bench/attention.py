"""The op: each implementation of routed attention, dense attention and flex attention, and the floor of their time."""
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F

from ops import IMPLS, RegionGrid, Routing, choose_impl, route_regions, routed_attention, unsupported

from . import flex
from .timing import Trial, compare, interleave, quartiles, timed, warm_up

FORWARD, BACKWARD = "forward", "forward + backward"
REFERENCE, DENSE, FLEX = "gather", "dense", "flex"
# Products of matrices: attention's two, and the five of its backward (one of them computes the logits again).
PRODUCTS = {FORWARD: 2, BACKWARD: 7}
# Maps read or written, each once: q, k, v, out; then q, k, v, out and its gradient, and three gradients.
MAPS = {FORWARD: 4, BACKWARD: 12}
# Calls rotate through sets of inputs that together are this many times the cache, so that none finds its own there.
CACHES = 4
CPU_CACHE_BYTES = 8 * 2**20

Maps = tuple[torch.Tensor, ...]  # query, key, value and the gradient of the output, (B, H, W, heads, head_dim) each


@dataclass(frozen=True)
class AttentionCase:
    """One shape of the op. `contenders` are implementations, "dense" and "flex"; `regions` is along each side."""
    stage: str
    batch: int
    height: int
    width: int
    heads: int
    regions: int
    topk: int
    mode: str
    contenders: tuple[str, ...] = (*IMPLS, DENSE, FLEX)
    head_dim: int = 32
    dtype: torch.dtype = torch.bfloat16

    @property
    def grid(self) -> RegionGrid:
        return RegionGrid.fit(self.height, self.width, self.regions)

    @property
    def map_bytes(self) -> int:
        return self.batch * self.height * self.width * self.heads * self.head_dim * self.dtype.itemsize

    def describe(self) -> str:
        return f"{self.height} x {self.width}, {self.heads} heads, {self.regions} x {self.regions}, top-{self.topk}"

    def inputs(self, device: torch.device) -> list[Maps]:
        """Sets of random maps, together several times the cache; query, key and value are views of one projection."""
        is_gpu = device.type == "cuda"
        cache = torch.cuda.get_device_properties(device).L2_cache_size if is_gpu else CPU_CACHE_BYTES
        shape = (self.batch, self.height, self.width, 3, self.heads, self.head_dim)
        sets = []
        for seed in range(math.ceil(CACHES * cache / (4 * self.map_bytes))):
            generator = torch.Generator(device).manual_seed(seed)
            qkv = torch.randn(shape, generator=generator, device=device, dtype=self.dtype)
            upstream = torch.randn(*shape[:3], *shape[4:], generator=generator, device=device, dtype=self.dtype)
            sets.append((*qkv.unbind(3), upstream))
        return sets


@dataclass
class Call:
    """A contender: `attend(query, key, value)` on one set of inputs after another, with gradients in BACKWARD mode."""
    attend: Callable[..., torch.Tensor]
    sets: list[Maps]
    mode: str
    restore: Callable[[torch.Tensor], torch.Tensor] = lambda x: x  # a result as (B, H, W, heads, head_dim)
    preparation: float = 0.0  # seconds, before the first call
    turn: int = 0

    def on(self, inputs: Maps) -> Maps:
        """The output and, in BACKWARD mode, the gradients of query, key and value."""
        *qkv, upstream = inputs
        if self.mode == FORWARD:
            with torch.no_grad():
                return (self.attend(*qkv),)
        # Detached: packing the three gradients into one again is the projection's work, not the op's.
        qkv = [x.detach().requires_grad_() for x in qkv]
        out = self.attend(*qkv)
        return (out.detach(), *torch.autograd.grad(out, qkv, upstream))

    def __call__(self):
        self.turn += 1
        self.on(self.sets[self.turn % len(self.sets)])

    def results(self) -> Maps:
        """The results on the first set of inputs, (B, H, W, heads, head_dim) each."""
        return tuple(self.restore(x) for x in self.on(self.sets[0]))


def dense_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of every token to the whole map, which routing replaces. All (B, H, W, heads, head_dim)."""
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(1, query.shape[1:3])


def _flex_call(case: AttentionCase, sets: list[Maps], routes: torch.Tensor) -> Call:
    """flex_attention; its block mask and its order of tokens are prepared before its time counts."""
    def order(maps: Maps) -> Maps:
        return tuple(flex.to_regions(x, case.grid) for x in maps)

    def prepare():
        return flex.block_mask(routes, case.grid), order(sets[0])

    prepare()  # warms up
    seconds = timed(prepare, routes.device)
    mask, first = prepare()
    attend = partial(flex.compiled(), block_mask=mask, kernel_options=flex.kernel_options(mask.BLOCK_SIZE[0]))
    ordered = [first, *(order(maps) for maps in sets[1:])]
    return Call(attend, ordered, case.mode, partial(flex.from_regions, grid=case.grid), seconds)


def build(name: str, case: AttentionCase, sets: list[Maps], routes: torch.Tensor) -> Call:
    """The contender of this name; routes are (B, regions, topk)."""
    if name == FLEX:
        return _flex_call(case, sets, routes)
    if name == DENSE:
        return Call(dense_attention, sets, case.mode)
    attend = partial(routed_attention, routing=Routing(routes, case.grid, case.grid), impl=name)
    return Call(attend, sets, case.mode)


def work(case: AttentionCase, routes: torch.Tensor) -> dict:
    """The fewest bytes that must move, and the operations of the products (two for a multiply-add)."""
    tokens_R = case.grid.token_counts(routes.device).flatten()  # without padding
    pairs = int((tokens_R * tokens_R[routes].sum(-1)).sum())
    return dict(
        bytes=MAPS[case.mode] * case.map_bytes + routes.nbytes,
        operations=PRODUCTS[case.mode] * 2 * pairs * case.heads * case.head_dim,
    )


def measure_ceilings(copy_bytes: int, side: int, dtype: torch.dtype, trial: Trial) -> list[dict]:
    """One row: bytes read plus bytes written a second, and operations (two for a multiply-add) a second.

    A buffer of `copy_bytes`, several times the cache, is copied; matrices of `side` x `side` are multiplied.
    """
    source = torch.randn(copy_bytes // 4, device=trial.device)
    target = torch.empty_like(source)
    # Random numbers: a GPU multiplies zeros faster than anything else.
    a, b = (torch.randn(side, side, device=trial.device).to(dtype) for _ in range(2))
    runs = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    for run in runs.values():
        warm_up(run, trial.device)
    seconds = interleave(runs, trial)
    bytes_per_second = [2 * copy_bytes / s for s in seconds["copy"]]
    operations_per_second = [2 * side**3 / s for s in seconds["product"]]
    return [dict(
        bytes_per_second=median(bytes_per_second), bytes_quartiles=quartiles(bytes_per_second),
        operations_per_second=median(operations_per_second), operations_quartiles=quartiles(operations_per_second),
        copy_mib=copy_bytes / 2**20, product=f"{side} x {side} x {side} {str(dtype).removeprefix('torch.')}",
    )]


def add_floors(rows: list[dict], ceilings: dict):
    """Add to the rows of `measure` the least time that their work takes on this machine, and their multiple of it."""
    for row in rows:
        if "failed" not in row:
            at_copy_speed = row["bytes"] / ceilings["bytes_per_second"]
            at_product_speed = row["operations"] / ceilings["operations_per_second"]
            row["floor_milliseconds"] = 1e3 * max(at_copy_speed, at_product_speed)
            row["times_floor"] = row["milliseconds"] / row["floor_milliseconds"]


def relative_error(results: Maps, reference: Maps) -> float:
    """The largest, over output and gradients, of |x - reference| / |reference| on the first image; NaN stays NaN."""
    errors = [((x[:1].to(r.dtype) - r).norm() / r.norm()).item() for x, r in zip(results, reference, strict=True)]
    return float("nan") if any(e != e for e in errors) else max(errors)


def check(name: str, call: Call, reference: Maps) -> dict:
    """Whether two launches agree bit for bit, and the error against the reference."""
    first = call.results()
    equal = [torch.equal(x, y) for x, y in zip(first, call.results(), strict=True)]
    checks = dict(output_repeats=equal[0])
    if len(equal) > 1:
        checks["gradients_repeat"] = all(equal[1:])
    if name != DENSE:
        checks["error"] = relative_error(first, reference)
    return checks


def measure(case: AttentionCase, trial: Trial) -> list[dict]:
    """One row for each contender: times, memory, correctness, work; or why it failed."""
    device, grid = trial.device, case.grid
    sets = case.inputs(device)
    query, key, *_ = sets[0]
    routing = route_regions(query, key, grid, grid, case.topk)
    routes, chosen = routing.routes, choose_impl(query, routing)
    # The published formulation, on the first image, in float32 at least.
    first = tuple(x[:1].to(torch.promote_types(case.dtype, torch.float32)) for x in sets[0])
    reference = build(REFERENCE, case, [first], routes[:1]).results()
    about = dict(asdict(case), case=case.describe(), dtype=str(case.dtype).removeprefix("torch."), **work(case, routes))
    del about["contenders"]
    rows = {name: dict(about, impl=name, auto=name == chosen) for name in case.contenders}

    def prepare(name: str) -> Call:
        call = build(name, case, sets, routes)
        rows[name].update(first_call_seconds=timed(call, device), prepare_milliseconds=1e3 * call.preparation)
        rows[name].update(check(name, call, reference))
        return call

    for name in case.contenders:
        reason = None if name in (DENSE, FLEX) else unsupported(name, query)
        if reason is not None:
            trial.failures[name] = reason
    return compare(rows, {name: partial(prepare, name) for name in rows}, REFERENCE, case.batch, trial, queued=True)
