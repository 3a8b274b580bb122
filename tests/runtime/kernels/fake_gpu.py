"""A GPU that is not here: enough of one for Inductor to write code for it.

Triton's driver only says which target to compile for, and Inductor reads an H100's properties from a
table. Nothing can run; what is compiled is the host code Inductor would run.
"""

import contextlib
from unittest import mock

import torch
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.runtime import hints
from torch.utils import _triton
from triton.backends.compiler import GPUTarget


class Driver:
    """What tracing and code generation ask a Triton driver."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_active_torch_device(self):
        return torch.device("cuda", 0)


H100 = hints.DeviceProperties(
    type="cuda",
    index=0,
    multi_processor_count=132,
    cc=90,
    major=9,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
)


@contextlib.contextmanager
def pretended():
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(triton.runtime.driver, "_active", Driver()))
        enter(mock.patch.object(hints.DeviceProperties, "create", lambda device: H100))
        enter(mock.patch.object(CudaInterface, "is_available", lambda: True))
        enter(mock.patch.object(CudaInterface, "get_compute_capability", lambda device=None: 90))
        enter(mock.patch.object(CudaInterface.Worker, "get_device_properties", lambda *_: H100))
        enter(mock.patch.object(torch.cuda, "current_device", lambda: 0))
        enter(mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)))
        for f in (_triton.has_triton, _triton.has_triton_package):
            if hasattr(f, "cache_clear"):
                f.cache_clear()
                stack.callback(f.cache_clear)
        yield


def code(gm, args, mode):
    """The body of Inductor's generated ``call`` for an AOT graph on fake CUDA tensors."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    with V.set_fake_mode(mode):
        post_grad_passes(gm, True)
    gm.recompile()
    lowering = GraphLowering(gm, shape_env=mode.shape_env, cpp_wrapper=False, is_inference=True)
    with (
        V.set_debug_handler(DebugContext()),
        V.set_graph_handler(lowering),
        V.set_fake_mode(mode),
    ):
        lowering.run(*args)
        text = lowering.codegen()[0].value
    return text[text.index("args.clear()") : text.index("def benchmark_compiled_module")]
