"""Where one optimizer step's time goes, by category."""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from measure import synchronize
from shapes import RANK, Shape

PRODUCTS = re.compile(
    r"aten::(mm|addmm|bmm|baddbmm|_scaled_mm|_addmm_activation|mkldnn_linear|linear|matmul)|dnnl|gemm"
)
KINDS = (  # the first that matches, of the kernel's name or else the operator's
    ("attention", re.compile(r"flash|fmha|attention|varlen", re.IGNORECASE)),
    ("optimizer", re.compile(r"adam|multi_tensor|foreach_|lpnorm|clip_grad|Optimizer", re.IGNORECASE)),
)
COPIES = re.compile(r"memcpy|memset|aten::(copy_|_to_copy|clone|contiguous|cat|zeros|zero_|fill_)", re.IGNORECASE)
GATHER = re.compile(r"aten::(index_select|index|index_put_|_index_put_impl_)|prefix|gather", re.IGNORECASE)
# what Inductor calls a kernel that does nothing else; a name is made of the operations fused in it
VIEWS = "t|view|unsafe_view|transpose|permute"
ONLY_CAST = re.compile(rf"triton_\w+?_fused(_+(to_copy|convert_element_type|{VIEWS}))+_\d+$")
ONLY_LAYOUT = re.compile(rf"triton_\w+?_fused(_+(clone|cat|{VIEWS}))+_\d+$")
ADAPTER = {RANK, 2 * RANK, 3 * RANK}  # widths of the adapter's products: one layer's, or of several that are joined


class Work(NamedTuple):
    """One kernel of a GPU, or on a CPU one operator."""

    operator: str
    """That started it, ``aten::mm`` and so on."""
    kernel: str
    """Its name on a GPU, else empty."""
    sizes: list
    """The shapes of the operator's inputs."""
    seconds: float
    around: str = ""
    """The operators that the operator is part of."""
    wide: tuple[list, ...] = ()
    """Their inputs' shapes."""
    backward: bool = False


def classify(work: Work, vocab_size: int) -> str:
    """The category of one piece of work; ``vocab_size`` tells the head and the loss from the rest."""
    shapes = [shape for sizes in (work.sizes, *work.wide) for shape in sizes if isinstance(shape, list | tuple)]
    widths = {size for shape in shapes for size in shape if isinstance(size, int)}
    own = {size for shape in work.sizes if isinstance(shape, list | tuple) for size in shape}
    for kind, pattern in KINDS:
        if pattern.search(work.kernel or work.operator):
            return kind
    if vocab_size in widths or re.search(r"softmax|nll_loss|cross_entropy|CrossEntropy", work.operator + work.kernel):
        return "head and loss"
    product = PRODUCTS.search(work.operator)
    if product or PRODUCTS.search(work.around):  # a copy inside an addmm is the addmm's
        if ADAPTER & (own if product else widths):
            return "LoRA backward" if work.backward else "LoRA forward"
        return "base products"
    if work.kernel and re.search(r"gemm|nvjet|cutlass|cublas|xmma", work.kernel, re.IGNORECASE):
        return "base products"
    if GATHER.search(work.operator) or GATHER.search(work.around):
        return "prefix gather" if any(len(shape) >= 3 for shape in shapes) else "head and loss"
    if ONLY_CAST.search(work.kernel):
        return "casts"
    if ONLY_LAYOUT.search(work.kernel):
        return "layout copies"
    if COPIES.search(work.operator) or COPIES.search(work.kernel):
        return "copies"
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
    for work in works(profiler.events(), on_gpu):
        kind = classify(work, shape.vocab_size)
        seconds[kind] += work.seconds
        names[f"{kind}: {work.kernel or work.operator}"[:160]] += work.seconds
    # profiling slows down the host, not the kernels: a GPU's gaps are what the plain step took beyond them
    gaps = (plain if on_gpu else profiled) - sum(seconds.values())
    most = [{"name": name, "seconds": value} for name, value in names.most_common(60)]
    if on_gpu:
        most += longest_waits(profiler.events())
    return {"seconds": plain, "profiled_seconds": profiled, "categories": dict(seconds) | {"gaps": gaps}, "most": most}


def longest_waits(events: list, n: int = 12) -> list[dict]:
    """List where the GPU had nothing to do for longest, between which kernels, and when in the step."""
    on_gpu = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    kernels = sorted(on_gpu, key=lambda event: event.time_range.start)
    waits, end, before = [], None, ""
    for event in kernels:
        start = event.time_range.start
        if end is not None and start > end:
            waits.append((start - end, start - kernels[0].time_range.start, before, event.name))
        if end is None or event.time_range.end > end:
            end, before = event.time_range.end, event.name
    total = sum(wait for wait, *_ in waits) / 1e6
    found = [{"name": f"all {len(waits)} waits of the GPU", "seconds": total}]
    for wait, at, before, after in sorted(waits, reverse=True)[:n]:
        name = f"wait at {at / 1e3:.1f} ms between {before[:50]} and {after[:50]}"
        found.append({"name": name, "seconds": wait / 1e6})
    return found


def works(events: list, on_gpu: bool) -> Iterator[Work]:
    """List what was computed: on a GPU each kernel, under the operator that started it where that is known."""
    if not on_gpu:
        for event in events:
            yield Work(event.name, "", event.input_shapes, event.self_cpu_time_total / 1e6)
        return
    operators = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    main = operators[0].thread if operators else 0
    rest: Counter = Counter()  # seconds of kernels that no operator is known to have started
    for event in events:
        annotation = event.is_user_annotation or event.name.startswith("Optimizer.")
        if event.device_type == torch.autograd.DeviceType.CUDA and not annotation:
            rest[event.name] += (event.time_range.end - event.time_range.start) / 1e6
    for event in operators:
        if not event.kernels:
            continue
        around, wide, outer = [], [], event.cpu_parent
        while outer is not None and len(around) < 4:
            around.append(outer.name)
            wide.append(outer.input_shapes)
            outer = outer.cpu_parent
        for kernel in event.kernels:
            if kernel.name not in rest:
                continue  # an annotation's span
            rest[kernel.name] -= kernel.duration / 1e6
            yield Work(
                event.name,
                kernel.name,
                event.input_shapes,
                kernel.duration / 1e6,
                " ".join(around),
                tuple(wide),
                backward=event.thread != main,  # autograd's own thread
            )
    for name, seconds in rest.items():
        if seconds > 1e-7:
            yield Work("", name, [], seconds)
