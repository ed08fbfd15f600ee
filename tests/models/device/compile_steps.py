"""Runs an engine whose kernels are compiled for a GPU that is not there, as far as Triton's own representation.

``python compile_steps.py CHECKPOINT FOLDER`` serves requests under the adapters that are FOLDER's folders. Nothing is
computed: kernels are specialised and compiled as a launch asks for, and not run, so what is sampled is without meaning.
Prints JSON: how many variants of each kernel were compiled, and those compiled when a step was run for the second time,
as a graph is captured. What cannot be compiled ends the program.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction

from loraplex.server.messages import (
    AdapterRef,
    Generate,
    LoadAdapter,
    OutputBatch,
    SamplingParams,
    WeightedAdapter,
)

PLAIN = ("lora", "dora")
"""Adapters that can be part of a mix."""

TARGET = GPUTarget("cuda", 90, 32)


class StandInDriver:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiler:
    """In place of Triton's: stops at its own representation, where what a GPU's launch may stumble over is found.

    Attributes:
        variants: of each kernel.
        in_capture: those that a step's second run asked for.
    """

    def __init__(self) -> None:
        self.variants: Counter[str] = Counter()
        self.in_capture: Counter[str] = Counter()
        self.is_captured = False
        self._backend = make_backend(TARGET)

    def install(self) -> None:
        triton.runtime.driver.set_active(StandInDriver())
        run, compiler = JITFunction.run, self

        def run_nothing(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            assert all(isinstance(count, int) and count > 0 for count in grid), (kernel.fn.__name__, grid)
            run(kernel, *args, grid=grid, warmup=True, **options)

        def compile_some(
            kernel: Any, key: str, signature: Any, device: int, constants: Any, options: Any, attrs: Any, warmup: bool
        ) -> Any:
            compiler.variants[kernel.fn.__name__] += 1
            compiler.in_capture[kernel.fn.__name__] += compiler.is_captured
            compiler.make_ir(kernel.ASTSource(kernel, signature, constants, attrs), options)
            kernel.device_caches[device][0][key] = key
            return key

        JITFunction.run, JITFunction._do_compile = run_nothing, compile_some

    def make_ir(self, source: Any, options: Any) -> None:
        context = ir.context()
        ir.load_dialects(context)
        self._backend.load_dialects(context)
        implementation = self._backend.get_codegen_implementation(options)
        source.make_ir(TARGET, options, implementation, self._backend.get_module_map(), context)


def impl_on_cpu(library: Any, name: str, implementation: Any, key: str, **options: Any) -> None:
    """In place of ``Library.impl``: tensors of the CPU go to the kernels."""
    register(library, name, implementation, "CPU" if key == "CUDA" else key, **options)


register = torch.library.Library.impl


def serve(engine: Any, requests: Mapping[str, tuple[Path, ...]]) -> None:
    """Requests by name, each under these adapters, one step after another until all have ended."""
    refs = {path: AdapterRef(name=path.name, path=str(path)) for paths in requests.values() for path in paths}
    for path, ref in refs.items():
        engine.handle(LoadAdapter(call_id=path.name, adapter=ref))
    drain(engine)
    for place, (name, paths) in enumerate(requests.items()):
        adapter = refs[paths[0]] if len(paths) == 1 else None
        mix = tuple(WeightedAdapter(adapter=refs[path], weight=0.5) for path in paths) if len(paths) > 1 else ()
        prompt, params = list(range(9 + 5 * place)), SamplingParams(max_tokens=3)
        engine.handle(Generate(request_id=name, prompt_ids=prompt, params=params, adapter=adapter, mix=mix))
    drain(engine)


def drain(engine: Any) -> None:
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, OutputBatch) and event.failed:
                raise SystemExit(f"{event.failed}")


def main(checkpoint: str, folder: Path) -> None:
    assert "loraplex.kernels.triton_runtime" not in sys.modules, "operators have been registered"
    torch.library.Library.impl = impl_on_cpu  # type: ignore[method-assign,assignment]
    from loraplex.kernels import devices
    from loraplex.server.engine_build import build_engine
    from loraplex.server.engine_config import EngineConfig

    devices.INTERPRETED = True
    compiler = Compiler()
    compiler.install()
    pool = {"pool_bytes": 32 << 20, "max_running": 8}
    engine = build_engine(EngineConfig(model=checkpoint, dtype="bfloat16", device="cpu", kernels="triton", **pool))
    watch_second_runs(compiler)
    paths = sorted(path for path in folder.iterdir() if path.is_dir())
    serve(engine, {"base": ()})
    serve(engine, {path.name: (path,) for path in paths if path.name in PLAIN})
    serve(engine, {"base": (), **{path.name: (path,) for path in paths}})
    serve(engine, {"mix": tuple(path for path in paths if path.name in PLAIN), "base": ()})
    engine.close()
    print(json.dumps({"variants": compiler.variants, "in_capture": +compiler.in_capture}))


def watch_second_runs(compiler: Compiler) -> None:
    """Run every step of a shape that may be captured twice."""
    from loraplex.server.device_program import StepProgram

    run = StepProgram.run

    def run_twice(program: StepProgram, batch: Any = None, *rest: Any) -> torch.Tensor:
        logits = run(program, batch, *rest)
        if batch is None:
            compiler.is_captured = True
            run(program)
            compiler.is_captured = False
        return logits

    StepProgram.run = run_twice  # type: ignore[method-assign]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
