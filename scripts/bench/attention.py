"""The op: routed attention by each implementation, against dense and flex attention, and against its floor."""
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F

from ops import IMPLS, RegionGrid, Routing, choose_impl, route_regions, routed_attention, unsupported

from . import flex
from .timing import input_sets, interleave_queued, peak_memory, quartiles, summarize, timed, warm
from .trial import Trial, Unsupported, describe

FORWARD, BACKWARD = "forward", "forward + backward"
REFERENCE = "gather"
DENSE, FLEX = "dense", "flex"
# Attention's two products, and the five of its backward (one of them the logits once more).
PRODUCTS = {FORWARD: 2, BACKWARD: 7}
# Maps read or written, each once: q, k, v, out; then q, k, v, out and its gradient, and three gradients.
MAPS = {FORWARD: 4, BACKWARD: 12}


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

    def describe(self) -> str:
        return f"{self.height} x {self.width}, {self.heads} heads, {self.regions} x {self.regions}, top-{self.topk}"


@dataclass
class Inputs:
    """One set: views of a packed (B, H, W, 3, heads, head_dim) projection, as the models use, and a gradient."""
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    upstream: torch.Tensor

    @classmethod
    def random(cls, case: AttentionCase, device: torch.device, seed: int) -> "Inputs":
        generator = torch.Generator(device).manual_seed(seed)
        shape = (case.batch, case.height, case.width, 3, case.heads, case.head_dim)
        qkv = torch.randn(shape, generator=generator, device=device, dtype=case.dtype)
        upstream = torch.randn(*shape[:3], *shape[4:], generator=generator, device=device, dtype=case.dtype)
        return cls(*qkv.unbind(3), upstream)

    def map(self, change: Callable) -> "Inputs":
        return Inputs(*(change(x) for x in (self.query, self.key, self.value, self.upstream)))


class Call:
    """A contender: `attend(query, key, value)` on one set of inputs after another, with its gradients if asked for."""

    def __init__(self, attend: Callable, sets: list[Inputs], mode: str, restore: Callable = lambda x: x):
        self.attend = attend
        self.sets = sets
        self.mode = mode
        self.restore = restore
        self.turn = 0

    def on(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        """The output, and the gradients of query, key and value, in the contender's own order of tokens."""
        qkv = (inputs.query, inputs.key, inputs.value)
        if self.mode == FORWARD:
            with torch.no_grad():
                return (self.attend(*qkv),)
        # The op's own gradient: packing the three again is the projection's business.
        qkv = tuple(x.detach().requires_grad_() for x in qkv)
        out = self.attend(*qkv)
        return (out.detach(), *torch.autograd.grad(out, qkv, inputs.upstream))

    def __call__(self):
        self.turn += 1
        self.on(self.sets[self.turn % len(self.sets)])

    def results(self) -> tuple[torch.Tensor, ...]:
        """Of the first set of inputs, (B, H, W, heads, head_dim) each."""
        return tuple(self.restore(x) for x in self.on(self.sets[0]))


def dense_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What routing replaces: every token attends to the whole map. All (B, H, W, heads, head_dim)."""
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(1, query.shape[1:3])


def _flex_call(case: AttentionCase, sets: list[Inputs], routes: torch.Tensor) -> tuple[Call, float]:
    """The contender, and the seconds that a block mask and the region order of one set take: not in its time."""
    grid = case.grid

    def prepare():
        return flex.block_mask(routes, grid), sets[0].map(partial(flex.to_regions, grid=grid))

    prepare()
    seconds = timed(prepare, routes.device)
    mask, first = prepare()
    ordered = [first, *(inputs.map(partial(flex.to_regions, grid=grid)) for inputs in sets[1:])]
    options = flex.kernel_options(mask.BLOCK_SIZE[0])
    attend = partial(flex.compiled(), block_mask=mask, kernel_options=options)
    return Call(attend, ordered, case.mode, partial(flex.from_regions, grid=grid)), seconds


def build(name: str, case: AttentionCase, sets: list[Inputs], routes: torch.Tensor) -> tuple[Call, float]:
    """A contender, and the seconds of what it has made beforehand.

    Raises:
        Unsupported: The implementation cannot run here.
    """
    if name == FLEX:
        return _flex_call(case, sets, routes)
    if name == DENSE:
        return Call(dense_attention, sets, case.mode), 0.0
    reason = unsupported(name, sets[0].query)
    if reason is not None:
        raise Unsupported(reason)
    attend = partial(routed_attention, routing=Routing(routes, case.grid, case.grid), impl=name)
    return Call(attend, sets, case.mode), 0.0


def routed_pairs(routes: torch.Tensor, query_grid: RegionGrid, key_grid: RegionGrid) -> int:
    """Pairs of a query and a key that the routes, (B, Rq, K), join; padding does not count."""
    queries_R = query_grid.token_counts(routes.device).flatten()
    keys_BR = key_grid.token_counts(routes.device).flatten()[routes].sum(-1)
    return int((queries_R * keys_BR).sum())


def work(case: AttentionCase, routes: torch.Tensor) -> dict:
    """The fewest bytes that must move, and the operations of the products (two for a multiply-add)."""
    map_bytes = case.batch * case.height * case.width * case.heads * case.head_dim * case.dtype.itemsize
    pairs = routed_pairs(routes, case.grid, case.grid)
    return dict(
        bytes=MAPS[case.mode] * map_bytes + routes.nbytes,
        operations=PRODUCTS[case.mode] * 2 * pairs * case.heads * case.head_dim,
    )


def reference_of_first_image(case: AttentionCase, inputs: Inputs, routes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What `results` should begin with: the published formulation in float32 at least."""
    dtype = torch.promote_types(case.dtype, torch.float32)
    first = inputs.map(lambda x: x[:1].to(dtype))
    return build(REFERENCE, case, [first], routes[:1])[0].results()


def relative_error(results: tuple[torch.Tensor, ...], reference: tuple[torch.Tensor, ...]) -> float:
    """The largest, over output and gradients, of |x - reference| / |reference| on the first image; NaN stays NaN."""
    errors = [
        ((x[:1].to(r.dtype) - r).norm() / r.norm()).item() for x, r in zip(results, reference, strict=True)
    ]
    return float("nan") if any(e != e for e in errors) else max(errors)


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> list[bool]:
    """Bit equality of each pair of tensors."""
    return [torch.equal(x, y) for x, y in zip(a, b, strict=True)]


def _check(name: str, call: Call, reference: tuple[torch.Tensor, ...]) -> dict:
    """Whether two launches agree bit for bit, and how far they are from the reference."""
    first = call.results()
    equal = same(first, call.results())
    checks = dict(output_repeats=equal[0])
    if len(equal) > 1:
        checks["gradients_repeat"] = all(equal[1:])
    if name != DENSE:
        checks["error"] = relative_error(first, reference)
    return checks


def measure(case: AttentionCase, trial: Trial) -> list[dict]:
    """One row for each contender: times, memory, correctness, work; or why it could not run."""
    grid = case.grid
    bytes_per_set = 4 * case.batch * case.height * case.width * case.heads * case.head_dim * case.dtype.itemsize
    sets = [Inputs.random(case, trial.device, seed) for seed in range(input_sets(bytes_per_set, trial.device))]
    routing = route_regions(sets[0].query, sets[0].key, grid, grid, case.topk)
    routes = routing.routes
    least = work(case, routes)
    chosen = choose_impl(sets[0].query, routing)
    calls, details = {}, {}
    try:
        reference = reference_of_first_image(case, sets[0], routes)
    except Exception as error:
        raise RuntimeError(f"no reference: {describe(error)}") from error
    for name in case.contenders:
        if name in trial.failures:
            continue
        with trial.guard(name):
            call, prepared = build(name, case, sets, routes)
            first_call = timed(call, trial.device)
            warm(call, trial.device)
            details[name] = dict(
                first_call_seconds=first_call,
                prepare_milliseconds=1e3 * prepared,
                **_check(name, call, reference),
                peak_memory_mb=peak_memory(call, trial.device),
            )
            calls[name] = call
    device_seconds, host_seconds = interleave_queued(calls, trial)
    about = dict(asdict(case), case=case.describe(), dtype=str(case.dtype).removeprefix("torch."), **least)
    del about["contenders"]
    return [
        _row(name, dict(about, impl=name, auto=name == chosen), details, device_seconds, host_seconds, case, trial)
        for name in case.contenders
    ]


def _row(name: str, about: dict, details: dict, device_seconds: dict, host_seconds: dict, case, trial) -> dict:
    if name not in device_seconds:
        return dict(about, failed=trial.failures[name])
    return dict(
        about,
        **details[name],
        **summarize(device_seconds[name], device_seconds.get(REFERENCE), case.batch),
        host_milliseconds=1e3 * statistics.median(host_seconds[name]),
        host_quartiles=[1e3 * q for q in quartiles(host_seconds[name])],
    )
