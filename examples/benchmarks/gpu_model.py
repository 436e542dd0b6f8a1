"""Models what the compiled views, heads and loss cost on an H100 or H200, on a machine without one.

    python examples/benchmarks/gpu_model.py --json model.json

torch.compile generates the code for tensors of a GPU that is not there, Triton's own assembler
compiles every kernel of it for that GPU (sm_90), and nothing runs. The modelled time is the bytes
that the kernels read and write over the memory's bandwidth: what a GPU needs at least, without
launches and arithmetic. It is a model and no measurement. Needs torch's CUDA build and Triton.
"""

import argparse
import copy
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.config as inductor
import triton.runtime
from torch import Tensor
from torch._dynamo.device_interface import (
    CudaInterface,
    caching_worker_current_devices,
    caching_worker_device_properties,
)
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.codecache import PyCodeCache
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from triton.backends.compiler import GPUTarget

from byol_pytorch.augment import byol_views
from byol_pytorch.heads import mlp
from byol_pytorch.loss import regression_loss

BANDWIDTHS = {"H100": 3.35e12, "H200": 4.8e12}  # bytes a second, NVIDIA's data sheets, SXM
GPU = torch.device("cuda", 0)
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, gcnArchName="",
    max_threads_per_block=1024, total_memory=80 << 30, L2_cache_size=50 << 20,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
)  # fmt: skip
PARTS = ("view 1", "view 2", "view 1, with draws", "view 2, with draws", "heads and loss")
WIDTH = 2048  # of ResNet-50's representation


class Recorded(BaseException):
    """Ends a compilation whose code is known. No Exception: torch would wrap that."""


@dataclass
class Kernel:
    name: str
    registers: int  # a thread; the most of all configurations that torch would time
    spilled: int  # bytes a thread, on the stack


@dataclass
class Model:
    """One compiled graph."""

    part: str
    triton: int  # launches
    extern: int  # calls of cuBLAS and of torch's own kernels
    gigabytes: float  # read and written
    milliseconds: dict[str, float]
    kernels: list[Kernel] = field(default_factory=list)

    @property
    def launches(self) -> int:
        return self.triton + self.extern


def main() -> None:
    args = parse_arguments()
    models: list[Model] = []
    print(
        f"A model, nothing is measured: torch {torch.__version__}, sm_90, batch {args.batch_size}, "
        f"uint8 {args.source} -> {args.image_size} px; heads of {WIDTH} features, bfloat16\n"
    )
    print("| | launches: Triton | extern | GB | ms H100 | ms H200 | registers | spilled |")
    print("|---|---|---|---|---|---|---|---|")
    for part in args.parts:
        for model in model_of(part, work_of(part, args), kernels=not args.skip_kernels):
            models.append(model)
            print(line(model), flush=True)
    both = [m for m in models if m.part in ("view 1", "view 2")]
    if len(both) == 2:
        total = {gpu: sum(m.milliseconds[gpu] for m in both) for gpu in BANDWIDTHS}
        print(f"\nBoth views: {', '.join(f'{ms:.2f} ms on an {gpu}' for gpu, ms in total.items())}")
    if args.json:
        figures = [{**asdict(model), "launches": model.launches} for model in models]
        args.json.write_text(json.dumps({"torch": torch.__version__, "models": figures}, indent=1))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all, in minutes each")
    add("--batch-size", type=int, default=256)
    add("--source", type=int, default=256, help="side of the uint8 images")
    add("--image-size", type=int, default=224, help="side of the views")
    add("--skip-kernels", action="store_true", help="no registers and spills, in a third the time")
    add("--json", type=Path, metavar="FILE", help="write the figures there as well")
    args = parser.parse_args()
    if not torch.backends.cuda.is_built():
        sys.exit("torch was built without CUDA; expected a CUDA build: pip install torch")
    return args


def work_of(part: str, args: argparse.Namespace) -> Callable[[], None]:
    if part == "heads and loss":
        return lambda: compile_heads(args.batch_size)
    return lambda: compile_view(int(part[5]) - 1, args, draws="draws" in part)


def model_of(part: str, work: Callable[[], None], *, kernels: bool = True) -> Iterator[Model]:
    """The graphs that the work compiles with `recorder`: one, or a forward and its backward."""
    with absent_h100(), recording() as graphs:
        work()
        names = [part] if len(graphs) == 1 else [f"{part}, forward", f"{part}, backward"]
        for name, (code, size) in zip(names, graphs, strict=True):
            body = code[code.rfind("def call(") :]
            triton = len(re.findall(r"^\s+\w+\.run\(", body, re.M))
            calls = r"^\s+(?:\w+ = )?(?:extern_kernels|aten|torch\.ops\.aten)\.[\w.]+\("
            extern = len(re.findall(calls, body, re.M))
            times = {gpu: size / speed * 1e3 for gpu, speed in BANDWIDTHS.items()}
            found = compiled_kernels(code) if kernels else []
            yield Model(name, triton, extern, size / 1e9, times, found)


def compile_view(number: int, args: argparse.Namespace, *, draws: bool) -> None:
    """The view by draws that are given, or with making them."""
    view = byol_views(args.image_size, compile=True)[number]
    with FakeTensorMode(allow_non_fake_inputs=True):
        shape = (args.batch_size, 3, args.source, args.source)
        images = torch.empty(shape, dtype=torch.uint8, device=GPU)
        view._follow(images.device)
        given = None if draws else view.forward_parameters(images.shape)
        with torch.no_grad():
            torch.compile(view._draw_and_run, backend=recorder, fullgraph=True)(images, given, None)


def compile_heads(batch: int) -> None:
    """Both projectors, the predictor and the loss, forward and backward."""
    projector, target, predictor = (mlp(dim, 256, 4096, None) for dim in (WIDTH, WIDTH, 256))

    def loss(e1: Tensor, e2: Tensor, t1: Tensor, t2: Tensor) -> Tensor:
        p1, p2 = predictor(projector(e1)), predictor(projector(e2))
        with torch.no_grad():
            z1, z2 = target(t1), target(t2)
        return regression_loss(p1, z2) + regression_loss(p2, z1)

    inputs = [torch.randn(batch, WIDTH, requires_grad=i < 2) for i in range(4)]
    # On a CPU: without a driver torch's autograd does not run over a GPU's tensors. `recorder`
    # moves its graphs.
    with torch.autocast("cpu", torch.bfloat16):
        value = torch.compile(loss, backend=recorder, fullgraph=True)(*inputs)
    value.backward()


def recorder(graph: torch.fx.GraphModule, inputs: list[Tensor], **_: Any) -> Any:
    """torch.compile's own backend up to the code; what then runs is the graph as it came."""

    def inner(graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        with suppress(Recorded):
            compile_fx_inner(*on_cuda(graph, inputs), **options)
        return make_boxed_func(graph.forward)

    return compile_fx(graph, inputs, inner_compile=inner)


def on_cuda(
    graph: torch.fx.GraphModule, inputs: list[Any]
) -> tuple[torch.fx.GraphModule, list[Any]]:
    """A copy of the graph, and its inputs, as fake tensors of the GPU."""
    moved = torch.fx.GraphModule(graph, copy.deepcopy(graph.graph))
    for node in moved.graph.nodes:
        if node.kwargs.get("device"):
            node.kwargs = {**node.kwargs, "device": GPU}
    mode = next(x.fake_mode for x in inputs if isinstance(x, FakeTensor))
    with mode:
        inputs = [x.to(GPU) if isinstance(x, Tensor) else x for x in inputs]
    FakeTensorProp(moved, mode).propagate_dont_convert_inputs(*inputs)
    return moved, inputs


@contextmanager
def recording() -> Iterator[list[tuple[str, int]]]:
    """(code, bytes) of each graph that is compiled meanwhile."""
    graphs: list[tuple[str, int]] = []

    def record(lowering: Any) -> None:
        code = lowering.codegen()[0]
        size = sum(node.get_read_write_buffers_sizes() for node in lowering.scheduler.nodes)
        graphs.append((getattr(code, "value", code), int(size)))
        raise Recorded

    with patch.object(GraphLowering, "compile_to_module", record):
        yield graphs


@contextmanager
def absent_h100() -> Iterator[None]:
    """Makes torch, inductor and Triton believe in one H100, as far as compiling goes."""
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_device_interface=lambda: torch.cuda,
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )
    answers: dict[str, Callable[..., Any]] = {
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: H100,
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda *_, **__: True,
        "set_device": lambda device: None,
        "_exchange_device": lambda device: device,
        "_maybe_exchange_device": lambda device: device,
        "synchronize": lambda device=None: None,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
    }
    settings = {
        "compile_threads": 1,  # other processes would not know of the GPU
        "force_disable_caches": True, "use_static_triton_launcher": False,
        "joint_graph_constant_folding": False,  # it would compute them on the device
    }  # fmt: skip
    with ExitStack() as stack:
        add = stack.enter_context
        for name, answer in answers.items():
            add(patch.object(torch.cuda, name, answer))
            if hasattr(CudaInterface, name):
                add(patch.object(CudaInterface, name, staticmethod(answer)))
        add(patch.object(CudaInterface, "is_available", staticmethod(lambda: True)))
        add(
            patch.object(
                CudaInterface, "raise_if_triton_unavailable", staticmethod(lambda *_: None)
            )
        )
        add(patch.dict(caching_worker_device_properties, {"cuda": [H100]}))
        add(patch.dict(caching_worker_current_devices, {"cuda": 0}))
        add(patch.object(FakeTensorMode, "avoid_device_init", property(lambda self: True)))
        add(patch.object(fake_tensor, "init_gpu_context", lambda device: None))
        add(patch.object(triton_helpers, "set_driver_to_gpu", lambda: None))
        add(patch.object(triton.runtime.driver, "_active", driver))
        add(inductor.patch(settings))
        folder = add(tempfile.TemporaryDirectory())
        add(patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder, TRITON_CACHE_DIR=folder))
        yield


def compiled_kernels(code: str) -> list[Kernel]:
    """Every Triton kernel of the code, compiled for the GPU."""
    found = []
    sources = re.findall(r"= async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.S)
    for name, source in sources:
        kernel = getattr(PyCodeCache.load(source), name)
        kernel.precompile(warm_cache_only=True)
        usages = [usage(result.kernel.asm["cubin"]) for result in kernel.compile_results]
        registers, spilled = map(max, zip(*usages, strict=True))
        found.append(Kernel(name, registers, spilled))
    return found


def usage(binary: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of one thread; a kernel of Triton's uses the stack to spill."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    assert found is not None, printed
    return int(found[1]), int(found[2])


def line(model: Model) -> str:
    registers = str(max(k.registers for k in model.kernels)) if model.kernels else ""
    spilled = str(max(k.spilled for k in model.kernels)) if model.kernels else ""
    times = [f"{ms:.2f}" for ms in model.milliseconds.values()]
    cells = [model.part, str(model.triton), str(model.extern), f"{model.gigabytes:.2f}", *times]
    return f"| {' | '.join([*cells, registers, spilled])} |"


if __name__ == "__main__":
    main()
