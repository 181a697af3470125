"""The time of one head step: ours against plain PyTorch.

`python -m benchmarks.speed.head_step [--quick]`, or `make bench`.

A step starts from the gradient G (C, s) and the feature mean, as backward() and the hook leave them. Single steps take
turns, so that every candidate meets P as cold. One that puts work off, as the deferred form and the rank form do,
counts by whole cycles. To add a candidate of ours, add a line to `ours`.

The floor is max(bytes / bandwidth, FLOP / rate): bytes by `traffic`, at the bandwidth of a copy of P; FLOP by `flop`,
at the rate of PyTorch's bare product G P or of its square one, whichever is higher. All are measured in the same run.
It is that of a dense P which each step reads and writes, so a form that does less can beat it; so can our own product,
which may be faster than PyTorch's. Where no dense P fits, only the rank form is timed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import torch

from mla_ext import backends, ops
from mla_ext.reference import Hyperparameters, accumulate_dtype

from .baselines import ALPHA, LR, MOMENTUM, State, best, graphed, make_state, released
from .report import OURS, Floor, Row, arguments, write
from .timing import ROUNDS, Candidate, available_memory, matmul_rate, peak_memory, time_interleaved

GRID = [(s, C) for C in (6, 101, 1000) for s in (128, 512, 768, 1024, 2048, 4096, 8192)]
GRID += [(s, C) for C in (6, 101) for s in (16384, 32768)]
QUICK = [(512, 6), (2048, 6), (768, 101)]
BASELINES = ["released", "best", "compiled", "graphed"]
RANK = 64
HYPER = Hyperparameters(lr=LR, momentum=MOMENTUM, alpha=ALPHA)
Step = Callable[[State], object]


def step_with(state: State, backend: str) -> None:
    """One step of ours by the op, in the form of P that the state has."""
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


def ours(device: str, C: int, s: int) -> dict[str, tuple[str, dict[str, int], int]]:
    """name -> (backend, the form of P for `make_state`, the steps of a cycle, which pay for what is put off)."""
    forms: dict[str, tuple[str, dict[str, int], int]] = {}
    for name in backends.usable(torch.device(device)):
        if name == "reference":
            continue
        forms[f"{OURS} {name}"] = (name, {}, 1)
        if rows := backends.BACKENDS[name].deferral(C, s, HYPER):
            forms[f"{OURS} {name}, deferred"] = (name, {"deferred": rows}, rows)
        if s > RANK:
            forms[f"{OURS} {name}, rank {RANK}"] = (name, {"rank": RANK}, RANK // 2)
    return forms


def traffic(s: int, C: int, dtype: torch.dtype, accumulate: torch.dtype) -> int:
    """Bytes that one step must move: P, the momentum buffer and W read and written, G and the feature mean read."""
    return accumulate.itemsize * (2 * s * s + 2 * C * s + s) + dtype.itemsize * 3 * C * s


def flop(s: int, C: int) -> int:
    """Additions and multiplications that one step must do: G P, P h and P - u u.T."""
    return 2 * C * s * s + 4 * s * s


def prepare(
    s: int, C: int, device: str, dtype: torch.dtype, dense: bool
) -> tuple[dict[str, State], dict[str, Candidate]]:
    """The candidates, and the state that each of them changes; with a dense P only where `dense`."""
    states: dict[str, State] = {}
    candidates: dict[str, Candidate] = {}

    def add(name: str, step: Step, steps: int = 1, **form: int) -> None:
        states[name] = make_state(C, s, device, dtype, **form)
        candidates[name] = Candidate(functools.partial(step, states[name]), steps)

    def add_graphed(name: str, step: Step, steps: int = 1, **form: int) -> None:
        states[name] = make_state(C, s, device, dtype, **form)
        candidates[name] = Candidate(graphed(functools.partial(step, states[name])), steps)
        states[name].restart_()  # as it was before the warm-up of the graph

    if dense:
        torch._dynamo.reset()  # compiled anew for each size; else the ninth size would not be compiled at all
        add("released", released)
        add("best", best)
        add("compiled", torch.compile(best, dynamic=False))
        if device == "cuda":
            add_graphed("graphed", best)
    for name, (backend, form, steps) in ours(device, C, s).items():
        if dense or "rank" in form:
            add(name, functools.partial(step_with, backend=backend), steps, **form)
            if device == "cuda":
                add_graphed(f"{name} graphed", functools.partial(step_with, backend=backend), steps, **form)
    return states, candidates


def check(states: Mapping[str, State], candidates: Mapping[str, Candidate]) -> None:
    """After equally many steps all that compute the same thing must agree, before anything is timed.

    The steps are whole cycles, and too few for the rank form to drop anything.
    """
    steps = math.lcm(*(candidate.steps for candidate in candidates.values()))
    for candidate in candidates.values():
        for _ in range(steps):
            candidate.call()
    truth = states["best"]
    close = {"rtol": 1e-3, "atol": 1e-4} if truth.weight.itemsize > 2 else {"rtol": 2e-2, "atol": 1e-3}
    for name, state in states.items():
        if name != "released":
            P = state.projection.dense()
            torch.testing.assert_close(P, truth.projection.base, rtol=1e-3, atol=1e-4, msg=name)
            torch.testing.assert_close(state.weight, truth.weight, **close, msg=name)


def hindrance(s: int, C: int, candidates: int, rounds: int, size: int, rate: float, seconds: float, device: str) -> str:
    """Why those with a dense P cannot be measured, or "": `size` bytes an element of P, `rate` in FLOP/s."""
    needed, available = (candidates + 4) * size * s * s, available_memory(device)
    if needed > 0.8 * available:
        return f"needs {needed / 1e9:.0f} GB, {available / 1e9:.0f} GB are free"
    predicted = (rounds + 2) * candidates * (2 * C * s * s + 60 * s * s) / rate
    if predicted > 20 * seconds:
        return f"would take {predicted:.0f} s, its budget is {20 * seconds:g} s"
    return ""


def measure(s: int, C: int, device: str, dtype: torch.dtype, rate: float, seconds: float) -> Row:
    row = Row({"s": s, "C": C})
    accumulate = accumulate_dtype(dtype)
    own = ours(device, C, s)
    rounds = max(ROUNDS, *(2 * steps for _, _, steps in own.values()))
    reason = hindrance(s, C, len(BASELINES) + len(own), rounds, accumulate.itemsize, rate, seconds, device)
    if reason:
        row.skipped["with a dense P"] = reason
    states, candidates = prepare(s, C, device, dtype, dense=not reason)
    bare = {}
    if not reason:
        check(states, candidates)
        P, grad = states["best"].projection.base, states["best"].grad.to(accumulate)
        copy, product = torch.empty_like(P), torch.empty_like(grad)
        bare = {
            "copy of P": Candidate(lambda: copy.copy_(P)),
            "bare G P": Candidate(lambda: torch.mm(grad, P, out=product)),
        }
    for candidate in candidates.values():  # to where cycles repeat: the rank form is full
        for _ in range(2 * candidate.steps):
            candidate.call()
    row.timings, skipped = time_interleaved(candidates | bare, seconds, device)
    row.skipped |= skipped
    if bare and bare.keys() <= row.timings.keys():
        bandwidth = 2 * P.nbytes / (row.timings["copy of P"].median * 1e-3)
        rate = max(rate, 2 * C * s * s / (row.timings["bare G P"].median * 1e-3))
        row.floor = Floor(traffic(s, C, dtype, accumulate), flop(s, C), bandwidth, rate)
    for name, state in states.items():
        row.memory[name] = state.nbytes + peak_memory(candidates[name].call, device)
    return row


def main() -> None:
    parsed = arguments(__doc__, GRID, QUICK)
    rate = matmul_rate(parsed.device, accumulate_dtype(parsed.dtype))
    rows = []
    for s, C in parsed.sizes:
        rows.append(measure(s, C, parsed.device, parsed.dtype, rate, parsed.seconds))
        print(rows[-1].title, rows[-1].skipped or "", flush=True)
    about = f"""Head step, momentum 0.9, absorb after; median (p20–p80) of single steps that take turns. A form that
        puts work off counts by whole cycles, which pay for it. Rank {RANK}: P as {RANK} rows and a number, exact up to
        as many updates. The floor, that of a dense P: bytes by the model over the bandwidth of a copy of P, or FLOP by
        the model over the rate of PyTorch's bare product G P or of its square one ({rate / 1e9:.0f} GFLOP/s), whichever
        takes longer."""
    write("head_step", about, rows, BASELINES if parsed.device == "cuda" else BASELINES[:-1], parsed)


if __name__ == "__main__":
    main()
