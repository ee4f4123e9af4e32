"""Where one optimizer step's time goes, by category."""

import re
import time
from collections import Counter
from collections.abc import Callable

import torch
from measure import synchronize
from shapes import RANK, Shape

PRODUCTS = re.compile(
    r"aten::(mm|addmm|bmm|baddbmm|_scaled_mm|_addmm_activation|mkldnn_linear|linear|matmul)|dnnl|gemm"
)
KINDS = (  # the first that matches, of the kernel's name or else the operator's
    ("attention", re.compile(r"flash|fmha|attention|varlen", re.IGNORECASE)),
    ("optimizer", re.compile(r"adam|multi_tensor|foreach_|lpnorm|clip_grad|Optimizer", re.IGNORECASE)),
    ("copies", re.compile(r"memcpy|memset|aten::(copy_|_to_copy|cat|zeros|zero_|fill_)|Memcpy", re.IGNORECASE)),
)


def classify(operator: str, kernel: str, sizes: list, vocab_size: int) -> str:
    """The category of one operator, or of one kernel that it started.

    Args:
        operator: its name, ``aten::mm`` and so on.
        kernel: the kernel's name on a GPU, else empty.
        sizes: the shapes of the operator's inputs.
        vocab_size: what tells the head and the loss from the rest.
    """
    widths = {size for shape in sizes if isinstance(shape, list | tuple) for size in shape if isinstance(size, int)}
    for kind, pattern in KINDS:
        if pattern.search(kernel or operator):
            return kind
    if PRODUCTS.search(operator):
        if vocab_size in widths:
            return "head and loss"
        return "LoRA products" if RANK in widths else "matrix products"
    if vocab_size in widths or re.search(r"softmax|nll_loss|cross_entropy|CrossEntropy", operator + kernel):
        return "head and loss"
    if kernel and re.search(r"gemm|nvjet|cutlass|cublas|xmma", kernel, re.IGNORECASE):
        return "matrix products"
    return "elementwise"


def profile(step: Callable[[], object], device: str, shape: Shape) -> dict:
    """Seconds of each category in one call of ``step``, which has run before; ``gaps`` is what is in none.

    On a GPU the time of its kernels, on a CPU each operator's own time: there ``gaps`` is Python between operators.
    """
    synchronize(device)
    began = time.perf_counter()
    step()
    synchronize(device)
    plain = time.perf_counter() - began
    on_gpu = torch.device(device).type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        began = time.perf_counter()
        step()
        synchronize(device)
        profiled = time.perf_counter() - began
    seconds, names = Counter(), Counter()
    for event in profiler.events():
        pieces = [(k.name, k.duration) for k in event.kernels] if on_gpu else [("", event.self_cpu_time_total)]
        for kernel, duration in pieces:
            kind = classify(event.name, kernel, event.input_shapes, shape.vocab_size)
            seconds[kind] += duration / 1e6
            names[f"{kind}: {kernel or event.name}"] += duration / 1e6
    # profiling slows down the host, not the kernels: a GPU's gaps are what the plain step took beyond them
    gaps = (plain if on_gpu else profiled) - sum(seconds.values())
    most = [{"name": name, "seconds": value} for name, value in names.most_common(40)]
    return {"seconds": plain, "profiled_seconds": profiled, "categories": dict(seconds) | {"gaps": gaps}, "most": most}
