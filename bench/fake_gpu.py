"""A GPU of compute capability 9.0 in name: what Triton and Inductor would run there, without one.

For processes of their own: what is replaced stays replaced.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"  # while the kernels are defined

import torch
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

TARGET = GPUTarget("cuda", 90, 32)
PROPERTIES = SimpleNamespace(
    name="sm_90", major=9, minor=0, multi_processor_count=132, warp_size=32, max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536, max_threads_per_block=1024, shared_memory_per_block=49152, total_memory=80 * 2**30,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472, L2_cache_size=50 * 2**20,
)  # fmt: skip
"""What Inductor asks of a GPU."""


class Driver:
    """Triton's driver of the GPU that is not there."""

    def get_current_target(self) -> GPUTarget:
        """Return the target of compilation."""
        return TARGET

    def get_current_device(self) -> int:
        """Return the number of the GPU."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Return where the tensors are."""
        return torch.device("cpu")


def admit_cpu_tensors() -> None:
    """Let CPU tensors pass to the kernels."""
    driver.set_active(Driver())
    os.environ |= {"TRITON_INTERPRET": "1", "FSR_KERNELS": "triton"}


class Program(NamedTuple):
    """What Inductor makes of one graph."""

    code: str
    """Python, with the kernels in it."""
    kernels: int
    """Launches of Inductor's own kernels."""
    others: int
    """Calls of other operators, such as matrix products and attention."""
    traffic: int
    """Bytes that Inductor's own kernels read and write."""
    refusal: str | None
    """Why the program cannot be a CUDA graph; None: it can."""


def pointwise_kernel(program: Program) -> tuple[ASTSource, int, int]:
    """Return the only kernel of a program, one without a reduction: source, warps, elements of a program's block.

    Of the sizes that Inductor would try, the first.
    """
    (source,) = re.findall(r"async_compile\.triton\('\w+', '''(.*?)'''", program.code, re.DOTALL)
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "0"}):
        module = PyCodeCache.load(source.replace("triton_helpers.set_driver_to_gpu()", ""))
    (tuner,) = (value for value in vars(module).values() if isinstance(value, CachingAutotuner))
    size, meta = tuner.configs[0], tuner.triton_meta
    constants = {(tuner.fn.arg_names.index(name),): value for name, value in (meta["constants"] | size.kwargs).items()}
    return ASTSource(tuner.fn, meta["signature"], constants, meta["configs"][0]), size.num_warps, size.kwargs["XBLOCK"]


class _Lowered(Exception):  # noqa: N818, not an error
    """Inductor has made its code, which nothing here can run."""


def programs_of(call: Callable[[], Any]) -> list[Program]:
    """Return the programs that Inductor makes for a call of a compiled function.

    Args:
        call: of a function from `torch.compile`, on tensors made within `pretend`.
    """
    from torch._inductor import config, cudagraph_utils, graph, scheduler, utils

    made: list[Program] = []

    def lower(lowering: Any) -> Any:
        code, _ = lowering.codegen()
        nodes = lowering.scheduler.nodes
        others = [node for node in nodes if isinstance(node, scheduler.ExternKernelSchedulerNode)]
        silent = (scheduler.ExternKernelSchedulerNode, scheduler.NopKernelSchedulerNode)
        own = [node for node in nodes if not isinstance(node, silent)]
        refusal = lowering.disable_cudagraphs_reason or cudagraph_utils.check_multiple_devices_or_any_cpu_nodes(
            dict(lowering.device_node_mapping)
        )
        refused = utils.get_first_incompatible_cudagraph_node(lowering.module)
        called = sum(type(node.node).__name__ != "MultiOutput" for node in others)
        traffic = sum(node.get_read_write_buffers_sizes() for node in own)
        made.append(Program(code.value, len(own), called, traffic, refusal or (str(refused) if refused else None)))
        raise _Lowered

    # partitioned, a program with work for the host would be several graphs and not be refused
    compiler = {"compile_threads": 1, "fx_graph_cache": False, "graph_partition": False}
    with mock.patch.object(graph.GraphLowering, "_compile_to_module", lower), config.patch(compiler):
        try:
            call()
        except Exception as error:  # Dynamo wraps what a backend raises
            if not isinstance(error.__cause__ or error, _Lowered) and "_Lowered" not in repr(error):
                raise
    return made


@contextmanager
def pretend() -> Iterator[None]:
    """Make tensors on the GPU that is not there; nothing is computed."""
    from torch._dynamo.device_interface import CudaInterface

    from fsr_fast.models.positions import bicubic_matrix  # after the kernels are defined

    def fixed(value: Any) -> Callable[..., Any]:
        return staticmethod(lambda *_, **__: value)

    asked = {"is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": PROPERTIES}
    asked |= {"get_compute_capability": 90, "is_bf16_supported": True, "synchronize": None}
    for name, value in asked.items():
        setattr(CudaInterface, name, fixed(value))
    for name in ("current_device", "get_device_properties"):
        setattr(CudaInterface.Worker, name, fixed(asked[name]))
    cuda = {"get_device_capability": (9, 0), "get_device_properties": PROPERTIES, "current_device": 0}
    cuda |= {"is_bf16_supported": True, "get_rng_state": None, "set_rng_state": None, "synchronize": None}
    cuda |= {"is_current_stream_capturing": False, "_lazy_init": None, "amp.common.amp_definitely_not_available": False}
    driver.set_active(Driver())
    bicubic_matrix.cache_clear()  # of tensors of another mode
    for name, value in cuda.items():
        mock.patch(f"torch.cuda.{name}", lambda *_, value=value, **__: value).start()
    with FakeTensorMode():
        yield
