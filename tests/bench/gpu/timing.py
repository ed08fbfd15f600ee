"""Times of work on a device: events on CUDA, the clock elsewhere; warmed up, medians, variants in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

Function = Callable[[], object]


def synchronize(device: torch.device) -> None:
    """Wait for all work of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    functions: Mapping[str, Function], device: torch.device, *, rounds: int, inner: int = 1, warmup: int = 2
) -> dict[str, float]:
    """Median device seconds of one call of each; in each round every function has its turn of ``inner`` calls."""
    for function in functions.values():
        for _ in range(warmup):
            function()
    synchronize(device)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(_sample(function, device, inner))
    return {name: median(some) for name, some in times.items()}


def seconds(function: Function, device: torch.device, *, rounds: int = 5, inner: int = 1, warmup: int = 2) -> float:
    """The same of one function."""
    return interleaved({"": function}, device, rounds=rounds, inner=inner, warmup=warmup)[""]


def _sample(function: Function, device: torch.device, inner: int) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(inner):
            function()
        return (time.perf_counter() - started) / inner
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(inner):
        function()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / inner


def captured(function: Function, device: torch.device, *, warmup: int = 3) -> Function:
    """The function as one CUDA graph to be replayed; on other devices the function itself."""
    if device.type != "cuda":
        return function
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay
