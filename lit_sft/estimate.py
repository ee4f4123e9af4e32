"""Peak memory before the run: the real step and the real loss over shapes alone, their live bytes counted."""

from dataclasses import dataclass, fields, replace
from itertools import count
from math import lcm
from warnings import catch_warnings

import torch
from lightning.fabric import Fabric

from lit_sft.args import LoRAArgs, LoRATrainArgs, TrainArgs
from lit_sft.batches import Row, Step
from lit_sft.config import ModelConfig
from lit_sft.generate import SAMPLE_TOKENS, generate
from lit_sft.live_bytes import LiveBytes
from lit_sft.loop import train_step, validate
from lit_sft.lora import apply_lora
from lit_sft.loss import CHUNKS, chunk_rows
from lit_sft.model import GPT
from lit_sft.offload import stream_blocks
from lit_sft.optim import build_optimizer, master_parameters
from lit_sft.quantize import is_quantized, place_quantized, quantized
from lit_sft.runtime import BASE_DTYPE

HOST = "meta"
"""The device of what --offload keeps in the host's memory: all else says that it is on the CPU, and is counted."""


@dataclass(frozen=True)
class Memory:
    """What a run takes of the device's memory, in bytes, as far as it is tensors."""

    weights: int
    trained: int
    """Adapters, or the fp32 masters of 16-bit weights."""
    optimizer: int
    """AdamW's two slots."""
    train: int
    """Most that is alive in a step, all of the above included; the next two alike."""
    validate: int
    sample: int
    host: int = 0
    """The host's share, with ``--offload``: the blocks' weights and inputs."""

    @property
    def activations(self) -> int:
        """What a step takes beside weights, adapter and optimizer: activations, gradients, temporaries."""
        return self.train - self.weights - self.trained - self.optimizer

    @property
    def peak(self) -> int:
        """The most of all phases."""
        return max(self.train, self.validate, self.sample)


def measure(args: TrainArgs, config: ModelConfig, row: Row, n_prompt: int | None = None) -> Memory:
    """What training ``config`` on ``row`` takes: blocks are alike, so a few are computed and their share multiplied.

    ``n_prompt``: tokens of the prompt that is answered between steps; None: as many as the row has.
    """
    every = max(args.checkpoint_every, 1)
    period = lcm(every, _period(config.sliding_layers), _period(config.rope_layers))
    few = config.n_layer % period + 2 * period
    if few + period >= config.n_layer:
        return _measure(args, config, row, n_prompt)
    one, two = (_measure(args, _shallow(config, n), row, n_prompt) for n in (few, few + period))
    times = (config.n_layer - few) // period
    return Memory(*(a + times * (b - a) for a, b in zip(_values(one), _values(two), strict=True)))


def _values(memory: Memory) -> list[int]:
    return [getattr(memory, f.name) for f in fields(memory)]


def _period(layers: tuple[bool, ...]) -> int:
    """After how many layers a pattern begins again."""
    return next(n for n in count(1) if layers[n:] == layers[:-n] or n >= len(layers))


def _shallow(config: ModelConfig, n_layer: int) -> ModelConfig:
    return replace(
        config,
        n_layer=n_layer,
        sliding_layers=config.sliding_layers[:n_layer],
        rope_layers=config.rope_layers[:n_layer],
    )


def _measure(args: TrainArgs, config: ModelConfig, row: Row, n_prompt: int | None = None) -> Memory:
    named = args.precision if args.precision != "16-mixed" else "bf16-mixed"  # a CPU knows no other; bytes are alike
    fabric = Fabric(accelerator="cpu", devices=1, precision=named)
    # the loss goes chunk by chunk, all alike: no more are computed than tell how large they are
    few = slice(CHUNKS * chunk_rows(len(row.labels), config.vocab_size))
    row = replace(row, labels=row.labels[few], counts=None if row.counts is None else row.counts[few])
    n_tokens = row.input_ids.numel()
    step = Step(1, 1, row.examples, [row], row.n_labels, n_tokens)
    prompt = [0] * min(n_prompt or n_tokens, config.block_size - SAMPLE_TOKENS)
    with LiveBytes(n_tokens, max(config.n_expert, 1)) as live, catch_warnings(action="ignore"):
        offload = isinstance(args, LoRATrainArgs) and args.offload
        model = _model(config, BASE_DTYPE[named], getattr(args, "quantize", None), offload)
        model.checkpoint_every = args.checkpoint_every
        weights = live.now
        dropout = apply_lora(model, args, args.seed) if isinstance(args, LoRAArgs) else None
        host, before = 0, live.now
        if offload:
            block_input = n_tokens * config.n_embd * BASE_DTYPE[named].itemsize
            blocks = stream_blocks(model, HOST).blocks
            host = sum(_pinned(block.buffer.numel()) + _pinned(block_input) for block in blocks)
        weights += live.now - before  # the places on the device
        masters = master_parameters(model)
        optimizer = build_optimizer(model, masters, args)
        trained = live.now - weights
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        optimizer.step()  # makes the slots
        optimizer.zero_grad()
        slots = live.now - weights - trained
        peaks = []
        for work in (
            lambda: train_step(fabric, model, optimizer, 0.0, step, args, dropout),
            lambda: validate(fabric, model, [row]),
            lambda: list(generate(model, prompt, SAMPLE_TOKENS, (0,))),  # which is the first id that comes
        ):
            live.peak = live.now
            work()
            peaks.append(live.peak)
    return Memory(weights, trained, slots, *peaks, host)


def _pinned(n_bytes: int) -> int:
    """Bytes of the host's memory that a pinned buffer takes: torch asks for powers of two."""
    return 1 << (n_bytes - 1).bit_length()


def _model(config: ModelConfig, dtype: torch.dtype, quantize: str | None, offload: bool) -> GPT:
    """What ``load_model`` gives, of tensors without contents."""
    with torch.device("meta"):
        model = GPT(config)
    weights, narrow = {}, {}
    for name, tensor in model.state_dict().items():
        weights[name] = torch.empty(tensor.shape, dtype=dtype)
        if not is_quantized(model, name):
            continue
        if quantize:
            narrow[name] = layer = quantized(weights[name], quantize)
            weights[name] = tensor
            if offload:
                layer.hold([part.to(HOST) for part in layer.frozen()])
        elif offload:
            weights[name] = weights[name].to(HOST)
    model.load_state_dict(weights, assign=True)
    for name, layer in narrow.items():
        place_quantized(model, name, layer)
    model.tie_weights()
    return model
