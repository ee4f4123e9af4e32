"""Adapter → base: a checkpoint_dir that needs no adapter, and says the same."""

from pathlib import Path

import torch
from torch import Tensor

from lit_sft.args import MergeArgs
from lit_sft.checkpoint import load_model, read_adapter_config, resolve_base, save_model
from lit_sft.errors import RunFailed
from lit_sft.layout import check_new
from lit_sft.lora import merge_lora
from lit_sft.model import GPT
from lit_sft.prompts import PROMPT_FACTS

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
CHECK_TOKENS = 64


def merge_checkpoint(args: MergeArgs) -> Path:
    """Merge ``args.lora_path`` into its base and write the result to ``args.out_dir``; gives that directory.

    Raises RunFailed, having written nothing, when the merged model's logits are not those of base and adapter.
    """
    adapter = read_adapter_config(args.lora_path)
    checkpoint_dir = resolve_base(args.checkpoint_dir, adapter)
    out_dir = check_new(args.out_dir, "out_dir")
    model = load_model(checkpoint_dir, args.lora_path)
    before = probe(model)
    merge_lora(model)
    error = ((probe(model) - before).norm() / before.norm()).item()
    allowed = TOLERANCE[model.wte.weight.dtype]
    if not error <= allowed:
        raise RunFailed(f"merging moves the logits by {error:.2e} of their size, above {allowed}; nothing was written")
    facts = {name: adapter.get(name) for name in PROMPT_FACTS} | {"merged_from": str(args.lora_path)}
    save_model(out_dir, model, checkpoint_dir, facts)
    print(f"saved {out_dir}: logits before and after differ by {error:.1e} of their size (allowed: {allowed})")
    return out_dir


@torch.no_grad()
def probe(model: GPT) -> Tensor:
    """Logits (2, CHECK_TOKENS, vocab_size) in fp64 on fixed token ids."""
    n = min(CHECK_TOKENS, model.config.block_size)
    ids = torch.randint(model.config.vocab_size, (2, n), generator=torch.Generator().manual_seed(0))
    return model(ids.to(model.wte.weight.device)).double()
