"""The time of one head step: ours against plain PyTorch.

`python -m benchmarks.speed.head_step [--quick]`, or `make bench`.

A step starts from the gradient G (C, s) and the feature mean, as backward() and the hook leave them; a candidate that
needs no G starts from its factors, delta (N, C) and features (N, s). Single steps take turns, so that every
candidate meets P as cold; one that puts work off counts by whole cycles.
To add a candidate of ours, add a line to `ours`.

The floor is max(bytes / bandwidth, FLOP / rate): bytes by `traffic`, at the bandwidth of a copy of P; FLOP by `flop`,
at the rate of PyTorch's bare product G P or of its square one, whichever is higher. All are measured in the same run.
It can be beaten: the model reads and writes P in each step, which a form that puts updates off need not, and our own
product may be faster than PyTorch's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch

from mla_ext import backends, checks, ops
from mla_ext.observation import Observation
from mla_ext.pending import ROWS, Pending
from mla_ext.reference import Hyperparameters, accumulate_dtype

from .baselines import ALPHA, LR, MOMENTUM, State, best, graphed, make_state, released
from .report import OURS, Floor, Row, arguments, write
from .timing import ROUNDS, Candidate, available_memory, matmul_rate, peak_memory, time_interleaved

# N matters where it is below C: only then are the factors of G smaller than G.
GRID = [
    (s, C, N) for C, N in ((6, 64), (101, 64), (1000, 64), (1000, 512)) for s in (128, 512, 768, 1024, 2048, 4096, 8192)
]
QUICK = [(512, 6, 64), (2048, 6, 64), (768, 101, 64)]
BASELINES = ["released", "best", "compiled", "graphed"]
HYPER = Hyperparameters(lr=LR, momentum=MOMENTUM, alpha=ALPHA)
Step = Callable[[State], object]


def step_with(state: State, backend: str) -> None:
    """One step of ours by the op."""
    ops.head_step_(
        state.weight,
        state.grad,
        state.momentum_buffer,
        state.projection,
        state.feature_mean,
        state.step,
        HYPER,
        backend=backend,
    )


class Deferred:
    """A step as ProjectedSGD makes it where C <= s: updates of P wait, and of every ROWS steps the last makes them."""

    def __init__(self, factored: bool) -> None:
        self.factored, self.pending = factored, None

    @torch.no_grad()
    def __call__(self, state: State) -> None:
        if self.pending is None:
            self.pending = Pending.beside(state.projection)
        observation = Observation(state.feature_mean, len(state.features), state.features, state.delta)
        factors = observation.factors_of(state.grad) if self.factored else None
        tensors = (state.weight, state.grad, state.momentum_buffer, state.projection, state.feature_mean, state.step)
        checks.check_head_step(*tensors, HYPER)
        ops.run_head_step_(*tensors, HYPER, None, None, "cpu", self.pending, factors)


def ours(device: str, C: int, N: int, dtype: torch.dtype) -> dict[str, tuple[Step, int]]:
    """name -> (what changes one state in place by a step, the steps of a cycle, after which P is dense)."""
    usable = [name for name in backends.usable(torch.device(device)) if name != "reference"]
    steps = {f"{OURS} {name}": (functools.partial(step_with, backend=name), 1) for name in usable}
    if "cpu" in usable:
        steps[f"{OURS} cpu, deferred"] = (Deferred(factored=False), ROWS)
        if N < C and dtype == accumulate_dtype(dtype):
            steps[f"{OURS} cpu, deferred, factored"] = (Deferred(factored=True), ROWS)
    return steps


def traffic(s: int, C: int, dtype: torch.dtype, accumulate: torch.dtype) -> int:
    """Bytes that one step must move: P, the momentum buffer and W read and written, G and the feature mean read."""
    return accumulate.itemsize * (2 * s * s + 2 * C * s + s) + dtype.itemsize * 3 * C * s


def flop(s: int, C: int, N: int) -> int:
    """Additions and multiplications that one step must do: G P, or delta.T (X P) if less; P h and P - u u.T."""
    return min(2 * C * s * s, 2 * N * s * s + 2 * C * N * s) + 4 * s * s


def prepare(start: State, device: str) -> tuple[dict[str, State], dict[str, Candidate]]:
    """The candidates, and the state that each of them changes."""
    own = ours(device, len(start.weight), len(start.features), start.weight.dtype)
    torch._dynamo.reset()  # compiled anew for each size; else the ninth size would not be compiled at all
    compiled = torch.compile(best, dynamic=False)
    steps = {"released": (released, 1), "best": (best, 1), "compiled": (compiled, 1), **own}
    states = {name: start.clone() for name in steps}
    candidates = {name: Candidate(functools.partial(f, states[name]), n) for name, (f, n) in steps.items()}
    if device == "cuda":
        for name, source in [("graphed", "best"), *((f"{name} graphed", name) for name in own)]:
            f, n = steps[source]
            states[name] = start.clone()
            candidates[name] = Candidate(graphed(functools.partial(f, states[name])), n)
            states[name].copy_(start)  # as it was before the warm-up of the graph
    return states, candidates


def check(states: dict[str, State], candidates: dict[str, Candidate]) -> None:
    """After equally many steps all that compute the same thing must agree, before anything is timed."""
    steps = math.lcm(*(candidate.steps for candidate in candidates.values()))
    for candidate in candidates.values():
        for _ in range(steps):
            candidate.call()
    close = {"rtol": 1e-3, "atol": 1e-4} if states["best"].weight.itemsize > 2 else {"rtol": 2e-2, "atol": 1e-3}
    for name, state in states.items():
        if name != "released":
            torch.testing.assert_close(state.projection, states["best"].projection, rtol=1e-3, atol=1e-4, msg=name)
            torch.testing.assert_close(state.weight, states["best"].weight, **close, msg=name)


def hindrance(s: int, C: int, candidates: int, size: int, rate: float, seconds: float, device: str) -> str | None:
    """Why a row cannot be measured, if it cannot: `size` bytes an element of P, `rate` in FLOP/s."""
    needed, available = (candidates + 4) * size * s * s, available_memory(device)
    if needed > 0.8 * available:
        return f"needs {needed / 1e9:.0f} GB, {available / 1e9:.0f} GB are free"
    predicted = (ROUNDS + 2) * candidates * (2 * C * s * s + 60 * s * s) / rate
    if predicted > 5 * seconds:
        return f"would take {predicted:.0f} s, its budget is {5 * seconds:g} s"
    return None


def measure(s: int, C: int, N: int, device: str, dtype: torch.dtype, rate: float, seconds: float) -> Row:
    row = Row({"s": s, "C": C, "N": N})
    accumulate = accumulate_dtype(dtype)
    size = accumulate.itemsize
    reason = hindrance(s, C, len(BASELINES) + len(ours(device, C, N, dtype)), size, rate, seconds, device)
    if reason is not None:
        row.skipped["all"] = reason
        return row
    start = make_state(C, s, device, dtype, N)
    states, candidates = prepare(start, device)
    check(states, candidates)
    copy, grad = torch.empty_like(start.projection), start.grad.to(accumulate)
    product = torch.empty_like(grad)
    bare = {
        "copy of P": Candidate(lambda: copy.copy_(start.projection)),
        "bare G P": Candidate(lambda: torch.mm(grad, start.projection, out=product)),
    }
    row.timings, row.skipped = time_interleaved(candidates | bare, seconds, device)
    if bare.keys() <= row.timings.keys():
        bandwidth = 2 * size * s * s / (row.timings["copy of P"].median * 1e-3)
        rate = max(rate, 2 * C * s * s / (row.timings["bare G P"].median * 1e-3))
        row.floor = Floor(traffic(s, C, dtype, accumulate), flop(s, C, N), bandwidth, rate)
    for name, state in states.items():
        own = sum(tensor.nbytes for tensor in vars(state).values())
        row.memory[name] = own + peak_memory(candidates[name].call, device)
    return row


def main() -> None:
    parsed = arguments(__doc__, GRID, QUICK)
    rate = matmul_rate(parsed.device, accumulate_dtype(parsed.dtype))
    rows = []
    for s, C, N in parsed.sizes:
        rows.append(measure(s, C, N, parsed.device, parsed.dtype, rate, parsed.seconds))
        print(rows[-1].title, rows[-1].skipped or "", flush=True)
    about = f"""Head step, momentum 0.9, absorb after; median (p20–p80) of single steps that take turns. A form that
        puts work off counts by whole cycles, which pay for it. The floor: bytes by the model over the bandwidth of a
        copy of P, or FLOP by the model over the rate of PyTorch's bare product G P or of its square one
        ({rate / 1e9:.0f} GFLOP/s), whichever takes longer."""
    write("head_step", about, rows, BASELINES if parsed.device == "cuda" else BASELINES[:-1], parsed)


if __name__ == "__main__":
    main()
