"""What the benchmarks share: two sides that must agree take turns, and the ratio of their times."""

import statistics
import time
from collections.abc import Callable

import torch


def median_seconds(run: Callable, rounds: int) -> float:
    """Of `rounds` calls, after one that warms up."""
    seconds = []
    for _ in range(1 + rounds):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def compare(name: str, ours: Callable, plain: Callable, rounds: int = 5, times: float = 1,
            atol: float = 1e-4, rtol: float = 1e-3) -> None:
    """Checks that both return the same tensors (None: not checked here), then times both in turns.

    Args:
        name: what is printed before the figures.
        ours: the project's way.
        plain: the usual way.
        rounds: of both.
        times: how often one run of `plain` counts.
        atol: tolerated difference of the results.
        rtol: the same, relative.
    """
    a, b = ours(), plain()
    if a is not None:
        torch.testing.assert_close(a, b, atol=atol, rtol=rtol)
    seconds = {ours: [], plain: []}
    for _ in range(rounds):
        for run in (ours, plain):
            began = time.perf_counter()
            run()
            seconds[run].append(time.perf_counter() - began)
    ratios = sorted(times * p / o for o, p in zip(seconds[ours], seconds[plain], strict=True))
    fast, slow = (1000 * statistics.median(seconds[run]) for run in (ours, plain))
    plain_time = f"{slow:.1f} ms" if times == 1 else f"{times:g} x {slow:.1f} ms"
    print(f"{name}: {fast:.1f} ms against {plain_time}: {times * slow / fast:.1f} times as fast "
          f"({ratios[0]:.1f} to {ratios[-1]:.1f} in {rounds} rounds)", flush=True)
