"""A GPU that is not there: what torch and its compiler ask about one is answered with an H200's facts.

Nothing runs on it. Together with fake tensors that suffices to trace, to generate code and to count.
"""

import ctypes
import os
from types import SimpleNamespace

# before torch reads them: every graph is compiled anew, in this process
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "0"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from torch import Tensor

CAPABILITY = (9, 0)
N_DEVICES = 1
MOST_DEVICES = 64  # what torch's C++ side is told: autograd asks it about each that there could be
PROPERTIES = SimpleNamespace(
    name="NVIDIA H200",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    total_memory=141 * 2**30,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    L2_cache_size=60 * 2**20,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    gcnArchName="",
)


def pretend() -> None:
    """Make this process believe in one GPU; it was started with both libraries of this folder."""
    torch.set_num_threads(1)
    # in this order: torch takes a guard that does nothing while it finds no device, and keeps it
    torch._C._ensureCUDADeviceGuardSet()
    ctypes.CDLL(os.environ["LABORATORY_DEVICE_COUNT"]).set_device_count(MOST_DEVICES)
    _answer_for_torch()
    _attend_without_asking()
    _answer_for_dynamo()
    _answer_for_inductor()


def _answer_for_torch() -> None:
    import torch._subclasses.fake_tensor as fake_tensor

    answers = {
        "is_available": False,  # else torch would start CUDA; what matters here asks something else
        "is_initialized": False,
        "device_count": N_DEVICES,
        "current_device": 0,
        "get_device_capability": CAPABILITY,
        "get_device_properties": PROPERTIES,
        "max_memory_allocated": 0,
        "_lazy_init": None,
        "synchronize": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, _always(answer))
    fake_tensor.init_gpu_context = _always(None)


def _attend_without_asking() -> None:
    """Let attention on the GPU be the kernel that takes masks: which it shall be torch asks CUDA itself in C++."""
    functional = torch.nn.functional
    on_cpu = functional.scaled_dot_product_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        settings = {"is_causal": is_causal, "scale": scale}
        if not query.is_cuda:
            settings |= {"attn_mask": attn_mask, "enable_gqa": enable_gqa}
            return on_cpu(query, key, value, **settings)
        times = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(times, dim=1) if times > 1 else x for x in (key, value))
        mask = attn_mask
        if mask is not None:
            mask = mask.expand(*query.shape[:3], key.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, compute_log_sumexp=True, **settings
        )[0]

    functional.scaled_dot_product_attention = attention


def _answer_for_dynamo() -> None:
    from torch._dynamo.device_interface import CudaInterface

    answers = {
        "is_available": True,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
        "device_count": N_DEVICES,
        "current_device": 0,
        "get_compute_capability": 10 * CAPABILITY[0] + CAPABILITY[1],
        "get_device_properties": PROPERTIES,
        "synchronize": None,
        "set_device": None,
        "exchange_device": 0,
        "maybe_exchange_device": 0,
    }
    for name, answer in answers.items():
        setattr(CudaInterface, name, staticmethod(_always(answer)))
    for name in ("current_device", "get_device_properties"):
        setattr(CudaInterface.Worker, name, staticmethod(_always(answers[name])))


def _answer_for_inductor() -> None:
    import torch._functorch.config as functorch_config
    import torch._inductor.compile_fx as compile_fx
    import torch._inductor.config as inductor_config
    import torch._inductor.scheduler as scheduler
    import torch._inductor.utils as utils
    import torch.utils._triton as triton

    functorch_config.enable_autograd_cache = False
    inductor_config.compile_threads = 1
    inductor_config.joint_graph_constant_folding = False  # which computes on the device
    for module in (triton, utils, scheduler):
        module.has_triton = _always(True)
    triton.triton_hash_with_backend = _always("none")
    compile_fx._check_triton_bf16_support = _always(None)


def _always(answer: object):
    return lambda *_, **__: answer
