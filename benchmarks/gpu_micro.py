"""Single kernels of a LoRA step, each beside the time that its operations and bytes take: a stage of gpu.py."""

import argparse
from collections.abc import Callable

import torch
from ceilings import BURST, TOKENS, Work, fp8_pair, mean_seconds, mixed_ceiling, product_pair, randn
from lengths import alpaca_like, preamble_of
from measure import device_name
from predictions import COPY_BYTES_PER_S, MICROSECONDS, card_of, floor_seconds, on_card
from shapes import ALPHA, RANK, SHAPES, Shape
from torch import Tensor

SETS = 3  # of inputs, in turn: together they are far larger than any cache
WIDER = 64  # columns beside x and W that hold a joined adapter's
SUSTAINED_S = {"cuda": 3.0, "cpu": 0.1}
ROW_TOKENS = {"cuda": 16_384, "cpu": 512}
Emit = Callable[..., None]


class Bench:
    """Times single kernels; one that fails leaves a finding that says why."""

    def __init__(self, args: argparse.Namespace, emit: Emit) -> None:
        self.device, self.emit, self.shape = args.device, emit, SHAPES[args.shape]
        self.name, self.tokens = device_name(args.device), TOKENS[args.device]

    def time(
        self,
        name: str,
        make: Callable[[], Work],
        flop: float = 0,
        n_bytes: float = 0,
        *,
        sets: int = SETS,
        calls: int = 20,
        fp8: bool = False,
        predicted: float | None = None,
    ) -> float | None:
        """Record the seconds of what ``make`` gives, each time on new tensors; None when it fails."""
        try:
            seconds = mean_seconds([make() for _ in range(sets)], self.device, calls)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            self.fail(name, error)
            return None
        predicted = predicted or floor_seconds(flop, n_bytes, self.name, fp8)
        self.emit(micro=name, seconds=seconds, flop=flop, bytes=n_bytes, predicted_s=predicted)
        return seconds

    def fail(self, name: str, error: Exception | str) -> None:
        """Record why there is no figure."""
        self.emit(micro=name, failed=error if isinstance(error, str) else f"{type(error).__name__}: {error}"[:300])

    def rand(self, *shape: int) -> Tensor:
        """Random numbers in bf16 on the device."""
        return randn(shape, self.device)


def micro(args: argparse.Namespace, emit: Emit) -> None:
    """Copies, products of the shape, FP8, the adapter's thin products, addmm, attention, the prefixes' gather."""
    bench = Bench(args, emit)
    copies(bench)
    products(bench)
    thin_products(bench)
    additions(bench)
    attention(bench)
    gather(bench)
    mixes(bench)
    grouped_attention(bench)  # last: no other figure depends on how that ends


def copies(bench: Bench) -> None:
    """Device to device."""
    n = 2**30 if bench.device == "cuda" else 2**22

    def make() -> Work:
        source, target = bench.rand(n // 2), bench.rand(n // 2)
        return lambda: target.copy_(source)

    card = card_of(bench.name)
    bench.time("copy of 1 GiB", make, n_bytes=2 * n, predicted=2 * n / COPY_BYTES_PER_S[card] if card else None)


def sizes_of(shape: Shape) -> dict[str, list[tuple[int, int]]]:
    """(in, out) of a block's linear layers as they are, and with query, key and value, gate and up, joined."""
    d, wide = shape.hidden_size, shape.intermediate_size
    d_kv = d // shape.num_attention_heads * shape.n_kv_heads
    return {"separate": shape.linears(), "joined": [(d, d + 2 * d_kv), (d, d), (d, 2 * wide), (wide, d)]}


def products(bench: Bench) -> None:
    """Each size in bursts: bf16, and FP8 with sums in full and in fewer bits."""
    sizes = sizes_of(bench.shape)
    for i, o in dict.fromkeys(sizes["separate"] + sizes["joined"]):
        flop = 2 * bench.tokens * i * o
        for kind in ("bf16", "fp8, exact sums", "fp8, fast sums"):
            for direction, layout in enumerate(("forward", "dX")):

                def make(i: int = i, o: int = o, kind: str = kind, direction: int = direction) -> Work:
                    if kind == "bf16":
                        return product_pair(i, o, bench.tokens, bench.device)[direction]
                    return fp8_pair(i, o, bench.tokens, bench.device, kind == "fp8, fast sums")[direction]

                bench.time(f"{i} × {o}, {kind}, {layout}", make, flop, sets=2, calls=BURST, fp8=kind != "bf16")


def mixes(bench: Bench) -> None:
    """All layers of a block one after the other: what the shares in the tables are of."""
    seconds = SUSTAINED_S[bench.device]
    for join, sizes in sizes_of(bench.shape).items():
        for kind in ("bf16", "fp8"):
            try:
                rates = mixed_ceiling(sizes, bench.device, seconds, kind)
            except RuntimeError as error:
                bench.fail(f"ceiling, {kind}, {join}", error)
                continue
            bench.emit(ceiling=kind, layers=join, **rates)


def thin_products(bench: Bench) -> None:
    """The adapter's: bound by reading the wide operand once."""
    T, d, wide = bench.tokens, bench.shape.hidden_size, bench.shape.intermediate_size

    def pair(left: tuple[int, int], right: tuple[int, int], turned: str = "", **options: object) -> Callable:
        def make() -> Work:
            a, b = bench.rand(*left), bench.rand(*right)
            a, b = a.T if "a" in turned else a, b.T if "b" in turned else b
            return lambda: torch.mm(a, b, **options)

        return make

    for width in (d, wide):
        read = 2 * T * width
        for r in (RANK, 3 * RANK):
            flop, n_bytes = 2 * T * width * r, read + 2 * T * r
            bench.time(f"x Aᵀ, {width}, r {r}", pair((T, width), (r, width), "b"), flop, n_bytes)
        flop = 2 * T * width * RANK
        bench.time(f"dy B, {width}, r {RANK}", pair((T, width), (width, RANK)), flop, read + 2 * T * RANK)
        for dtype in (torch.bfloat16, torch.float32):
            options = {} if dtype == torch.bfloat16 else {"out_dtype": dtype}
            named = str(dtype).removeprefix("torch.")
            bench.time(f"dA = lowᵀ x, {width}, {named}", pair((T, RANK), (T, width), "a", **options), flop, read)
            bench.time(f"dB = dyᵀ low, {width}, {named}", pair((T, width), (T, RANK), "a", **options), flop, read)


def additions(bench: Bench) -> None:
    """A base product and the adapter's added to it: out of place, in place, and the other way round."""
    T, d, scale = bench.tokens, bench.shape.hidden_size, ALPHA / RANK

    def out_of_place(x: Tensor, low: Tensor, weight: Tensor, b: Tensor) -> Tensor:
        return torch.addmm(x @ weight, low, b, alpha=scale)

    def in_place(x: Tensor, low: Tensor, weight: Tensor, b: Tensor) -> Tensor:
        return (x @ weight).addmm_(low, b, alpha=scale)

    def other_way(x: Tensor, low: Tensor, weight: Tensor, b: Tensor) -> Tensor:
        return (low @ b).addmm_(x, weight)

    def base_alone(x: Tensor, low: Tensor, weight: Tensor, b: Tensor) -> Tensor:
        return x @ weight

    ways = {"base alone": base_alone, "addmm": out_of_place, "addmm_": in_place, "low B, then addmm_": other_way}
    passes = {"base alone": 0, "addmm": 4, "addmm_": 2, "low B, then addmm_": 1}  # over y, beyond the base product's
    for o in (d, bench.shape.intermediate_size):
        for name, way in ways.items():

            def make(o: int = o, way: Callable = way) -> Work:
                # weights as layers hold them, (out, in)
                tensors = bench.rand(T, d), bench.rand(T, RANK), bench.rand(o, d).T, bench.rand(o, RANK).T
                return lambda: way(*tensors)

            base = floor_seconds(2 * T * d * o, 0, bench.name)
            beyond = floor_seconds(0, passes[name] * 2 * T * o, bench.name)
            predicted = base + beyond if base else None
            bench.time(f"{d} × {o} + adapter: {name}", make, 2 * T * d * o, predicted=predicted)

        def make_wider(o: int = o) -> Work:
            x, weight = bench.rand(T, d + WIDER), bench.rand(o, d + WIDER).T
            return lambda: x @ weight

        bench.time(f"{d} × {o} + adapter: [x, low] [W, B]ᵀ", make_wider, 2 * T * d * o, predicted=base)


class Packed:
    """A row of examples like Alpaca's, and torch's variable-length attention within them."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.heads = bench, bench.shape.num_attention_heads
        self.size = bench.shape.hidden_size // self.heads
        self.lengths = row_lengths(ROW_TOKENS["cuda"])
        self.T = sum(self.lengths)
        self.ends = torch.tensor([0, *self.lengths]).cumsum(0).to(bench.device, torch.int32)

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention of (T, heads, size)."""
        from torch.nn.attention.varlen import varlen_attn

        most = max(self.lengths)
        return varlen_attn(query, key, value, self.ends, self.ends, most, most, window_size=(-1, 0))

    def repeated(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same where there are fewer keys and values: each is given to its queries one by one."""
        times = query.shape[1] // key.shape[1]
        return self.mix(query, key.repeat_interleave(times, 1), value.repeat_interleave(times, 1))

    def inputs(self, groups: int) -> list[Tensor]:
        """Queries, and ``groups`` heads of keys and values."""
        return [self.bench.rand(self.T, n, self.size).requires_grad_() for n in (self.heads, groups, groups)]

    def both_ways(self, way: Callable, tensors: list[Tensor], upstream: Tensor) -> list[Tensor]:
        """The result and the gradients."""
        mixed = way(*tensors)
        return [mixed, *torch.autograd.grad(mixed, tensors, upstream)]

    def time(self, name: str, way: Callable, groups: int) -> float | None:
        """Forward and backward."""

        def make() -> Work:
            tensors, upstream = self.inputs(groups), self.bench.rand(self.T, self.heads, self.size)
            return lambda: self.both_ways(way, tensors, upstream)

        now, _ = on_card(MICROSECONDS["attention"], self.bench.name)
        predicted = now * 1e-6 / self.bench.shape.num_hidden_layers * self.T if now else None
        flop = 14 * self.bench.shape.hidden_size * sum(n * (n + 1) / 2 for n in self.lengths)
        return self.bench.time(name, make, flop, predicted=predicted)


def attention(bench: Bench) -> None:
    """Variable-length attention with as many keys as queries."""
    if bench.device != "cuda":
        bench.fail("varlen attention", "needs a GPU")
        return
    packed = Packed(bench)
    packed.time("varlen attention, both ways", packed.mix, packed.heads)


def grouped_attention(bench: Bench) -> None:
    """With a quarter of the key and value heads: repeated, and given as they are, where that is taken."""
    if bench.device != "cuda":
        bench.fail("varlen attention of fewer key/value heads", "needs a GPU")
        return
    packed = Packed(bench)
    few = packed.heads // 4
    packed.time(f"varlen attention, {few} key/value heads, repeated", packed.repeated, few)
    if packed.time(f"varlen attention, {few} key/value heads, as they are", packed.mix, few) is None:
        return
    tensors, upstream = packed.inputs(few), bench.rand(packed.T, packed.heads, packed.size)
    ways = [packed.both_ways(way, tensors, upstream) for way in (packed.mix, packed.repeated)]
    differences = [apart(found, expected) for found, expected in zip(*ways, strict=True)]
    bench.emit(note=f"{few} key/value heads as they are and repeated differ by", differences=differences)


def apart(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to that of ``expected``."""
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


def row_lengths(most: int) -> list[int]:
    """Lengths of examples like Alpaca's, as many as a row of ``most`` tokens holds."""
    lengths: list[int] = []
    for example in alpaca_like(200, 1000):
        if sum(lengths) + len(example.ids) > most:
            break
        lengths.append(len(example.ids))
    return lengths


def gather(bench: Bench) -> None:
    """Keys of a row with shared prefixes, and their gradients summed: over all keys, and over the repeated ones."""
    heads, size = bench.shape.num_attention_heads, bench.shape.hidden_size // bench.shape.num_attention_heads
    index, n_shared, n_rows = shared_row(ROW_TOKENS[bench.device])
    # of each row one key is its own, the first that is read of it; the others are repetitions of shared rows
    seen, first, extra = set(), [], []
    for place, row in enumerate(index.tolist()):
        (extra if row in seen else first).append(place)
        seen.add(row)
    shared_of_extra = index[extra].to(bench.device)
    index, first, extra = (torch.as_tensor(x, device=bench.device) for x in (index, first, extra))

    def old(grad: Tensor) -> Tensor:
        total = torch.zeros(n_rows, heads, size, device=grad.device)
        return total.index_put_((index,), grad.float(), accumulate=True).to(grad.dtype)

    def new(grad: Tensor) -> Tensor:
        total = grad.index_select(0, first)
        sums = total[:n_shared].float()
        sums.index_put_((shared_of_extra,), grad.index_select(0, extra).float(), accumulate=True)
        total[:n_shared] = sums
        return total

    def of(way: Callable, n: int) -> Callable[[], Work]:
        def make() -> Work:
            x = bench.rand(n, heads, size)
            return lambda: way(x)

        return make

    row = 2 * heads * size  # bytes of a key
    K = len(index)
    bench.time("prefix gather, forward", of(lambda x: x.index_select(0, index), n_rows), n_bytes=2 * K * row)
    # zeros and sums in fp32, read and written; the gradient widened
    bench.time("prefix gather, backward, all keys", of(old, K), n_bytes=(11 * K + 5 * n_rows) * row)
    n_bytes = (2 * n_rows + 10 * len(extra)) * row
    bench.time("prefix gather, backward, repeated ones", of(new, K), n_bytes=n_bytes)
    grad = bench.rand(K, heads, size)
    facts = {"rows": n_rows, "keys": K, "repeated": len(extra), "differences": [apart(new(grad), old(grad))]}
    bench.emit(note="prefix gather: the two ways backward differ by", **facts)


def shared_row(most: int) -> tuple[Tensor, int, int]:
    """The row's position of each key (K,), how many rows are shared prefixes (they come first), and rows in all."""
    examples = alpaca_like(200, 1000)[: len(row_lengths(most))]
    kinds = [preamble_of(k) for k in range(len(examples))]
    prefixes = dict.fromkeys(kinds)
    places, start = {}, 0
    for kind in prefixes:
        places[kind] = torch.arange(start, start + kind[1])
        start += kind[1]
    n_shared = start
    keys = list(places.values())
    for example, kind in zip(examples, kinds, strict=True):
        n_own = len(example.ids) - kind[1]
        keys += [places[kind], torch.arange(start, start + n_own)]
        start += n_own
    return torch.cat(keys), n_shared, start
