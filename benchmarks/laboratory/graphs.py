"""Records what Inductor makes of each graph, and runs the graph itself on fake tensors instead of the code."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import torch._inductor.compile_fx as compile_fx
from fake import COPIES, FakeGPU
from torch import nn
from torch._dynamo.utils import counters
from torch._guards import TracingContext
from torch._inductor.graph import GraphLowering

Key = tuple[int, bool]
"""A graph's number, as its forward and backward parts share it, and whether it is the backward one."""


@dataclass
class Work:
    """Work of one block in one direction during one row."""

    graphs: list[Key] = field(default_factory=list)
    eager: Counter[str] = field(default_factory=Counter)
    """Operations outside the graphs that start a kernel."""

    @property
    def eager_copies(self) -> int:
        """Operations among them that only copy."""
        return sum(n for name, n in self.eager.items() if name.startswith(COPIES))


@dataclass
class Row:
    """Work of the blocks in one row, by their number."""

    graphs_before: int
    """Graphs that Dynamo had made until then."""
    forward: dict[int, Work] = field(default_factory=dict)
    backward: dict[int, Work] = field(default_factory=dict)


class Recorder:
    """Watches a compiled model run: which code each block executes, and how many graphs there are after each row."""

    def __init__(self, mode: FakeGPU) -> None:
        self.mode = mode
        self.codes: dict[Key, list[str]] = {}
        self.rows: list[Row] = []
        self.on_block: Callable[[int, tuple, object], None] | None = None
        """Told of each call of a block: its number, arguments and result."""
        self._block = 0
        self._current: Work | None = None  # of the block whose forward pass is under way
        self._backward: Work | None = None  # of the block whose backward pass is under way
        self._waiting: Counter[str] = Counter()  # operations since the newest backward part
        self._owners: list[tuple[int, int]] = []  # (block, graph) of forward parts that wait for their backward ones
        self._inside = False
        mode.note_operation = self._note_operation

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within, Inductor's code is kept and never loaded."""
        compiled, loaded = compile_fx._compile_fx_inner, GraphLowering.compile_to_module
        texts: list[str] = []
        known: dict[str, tuple[list[str], list]] = {}  # graph → its code, and its outputs' strides

        def keep(graph: GraphLowering) -> object:
            text, _ = graph.codegen()
            texts.append(text.value)
            return SimpleNamespace(__file__=__file__, call=lambda *_: None)

        def record(module: torch.fx.GraphModule, inputs: object, **options: object) -> Callable:
            runnable = copy.deepcopy(module)  # before Inductor's passes change it
            graph = module.print_readable(print_output=False, include_stride=True, include_device=True)
            strides = TracingContext.get().output_strides
            if graph in known:  # made anew for another row, which takes Inductor as long and gives the same
                code, strides_of_known = known[graph]
                if strides is not None:
                    strides += strides_of_known
            else:
                texts.clear()
                compiled(module, inputs, **options)
                code = list(texts)
                known[graph] = code, list(strides or [])
            key = options["graph_id"], bool(options.get("is_backward"))
            self.codes[key] = code
            return self._runner(key, runnable)

        compile_fx._compile_fx_inner, GraphLowering.compile_to_module = record, keep
        try:
            yield
        finally:
            compile_fx._compile_fx_inner, GraphLowering.compile_to_module = compiled, loaded

    def watch(self, model: nn.Module) -> None:
        """Note rows and blocks of a model whose blocks are compiled, or not."""
        hidden_states = model.hidden_states

        def row(*args: object, **kwargs: object) -> object:
            self.rows.append(Row(n_graphs()))
            self._owners, self._current, self._waiting = [], None, Counter()
            return hidden_states(*args, **kwargs)

        model.hidden_states = row
        for number, block in enumerate(model.blocks):
            call = block._compiled_call_impl or block._call_impl
            # torch calls this in place of the block: around what is compiled, and so no part of it
            block._compiled_call_impl = self._watched(number, call)

    def _watched(self, number: int, call: Callable) -> Callable:
        def watched(*args: object, **kwargs: object) -> object:
            before = self._current
            self._block, self._current = number, Work()
            self.rows[-1].forward[number] = self._current
            try:
                result = call(*args, **kwargs)
            finally:
                self._current = before
            if self.on_block is not None:
                self.on_block(number, args, result)
            return result

        return watched

    def _runner(self, key: Key, module: torch.fx.GraphModule) -> Callable:
        number, is_backward = key

        def run(inputs: list) -> object:
            if is_backward:
                work = self._begin_backward(self._owner(number))
            else:
                work = self._current
                self._owners.append((self._block, number))
            work.graphs.append(key)
            self._inside = True
            try:
                return module(*inputs)
            finally:
                self._inside = False
                inputs.clear()  # as the convention of such calls asks for

        run._boxed_call = True
        return run

    def _begin_backward(self, block: int) -> Work:
        """The block's work; what ran since its own part before this one belongs to it as well."""
        work = self.rows[-1].backward.setdefault(block, Work())
        if work is self._backward:
            work.eager += self._waiting
        self._backward, self._waiting = work, Counter()
        return work

    def _owner(self, number: int) -> int:
        """The block whose turn it is: backward parts run in the reverse order of the forward ones."""
        while self._owners:
            block, graph = self._owners.pop()
            if graph == number:
                return block
        raise RuntimeError(f"the backward part of graph {number} ran without its forward part")

    def _note_operation(self, name: str) -> None:
        if self._inside:
            return
        if self._current is not None:
            self._current.eager[name] += 1
        elif not name.startswith("aten.add_."):  # gradients of later rows, added to those of earlier ones
            self._waiting[name] += 1


def n_graphs() -> int:
    """Graphs that Dynamo has made so far in this process."""
    return counters["stats"]["unique_graphs"]
