"""Make the demo's model: a tiny Llama with random weights and its own tokenizer, as a Hub checkpoint.

Needs no network. The folder is like one that scripts/download.py fills: convert it, then fine-tune it.
"""

import argparse
import csv
import io
import json
import math
import sys
from pathlib import Path

from lit_sft.atomic import publish_directory
from lit_sft.errors import InputError
from lit_sft.layout import HF_CONFIG

INSTRUCTIONS = Path(__file__).with_name("instructions.csv")
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.model"
FILES = ("generation_config.json", "tokenizer_config.json", TOKENIZER, WEIGHTS, HF_CONFIG)

HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE, CONTEXT = 128, 4, 4, 2, 344, 512
# transformers' default, 0.02, keeps the logits near zero: a LoRA on the blocks cannot learn through so small a frozen
# head. With 1/√hidden it learns the whole CSV by heart.
STD = 1 / math.sqrt(HIDDEN)
VOCAB_SIZE = 800
UNK, BOS, EOS = 0, 1, 2

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.",
    "### Instruction:",
    "### Input:",
    "### Response:",
)


def corpus() -> list[str]:
    """The lines the tokenizer learns from: the CSV's cells and the Alpaca template."""
    with INSTRUCTIONS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # The template opens every example, so it counts as often; its words become single tokens.
    texts = [*(cell for row in rows for cell in row.values()), *ALPACA * len(rows)]
    # Llama's tokenizer has no piece for a newline (byte fallback spells it), so it learns from lines.
    return [line for text in texts for line in text.splitlines() if line]


def train_tokenizer() -> bytes:
    """A ``tokenizer.model`` with the conventions of Llama's."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        character_coverage=0.999,  # the rarest letters are left to byte fallback, as in a real tokenizer
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def model_config() -> dict:
    """The config.json of the model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        "vocab_size": VOCAB_SIZE,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "initializer_range": STD,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def weight_shapes() -> dict[str, tuple[int, ...]]:
    """Hub name → shape of every weight; those of one dimension are norms."""
    kv = HIDDEN // HEADS * KV_HEADS
    block = {
        "input_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    shapes = {"model.embed_tokens.weight": (VOCAB_SIZE, HIDDEN)}
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in block.items()}
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB_SIZE, HIDDEN)}


def make_checkpoint(directory: Path, seed: int) -> None:
    """Fill ``directory``, which is absent or empty; InputError when something else is there."""
    import torch
    from safetensors.torch import save

    with publish_directory(directory, "demo checkpoint") as temporary:
        generator = torch.Generator().manual_seed(seed)
        weights = {
            name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * STD
            for name, shape in weight_shapes().items()
        }
        (temporary / WEIGHTS).write_bytes(save(weights, metadata={"format": "pt"}))
        (temporary / TOKENIZER).write_bytes(train_tokenizer())
        tokenizer_config = {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "clean_up_tokenization_spaces": False,
            "legacy": False,
            "model_max_length": CONTEXT,
        }
        generation_config = {"bos_token_id": BOS, "eos_token_id": EOS}
        contents = {
            HF_CONFIG: model_config(),
            "tokenizer_config.json": tokenizer_config,
            "generation_config.json": generation_config,
        }
        for name, content in contents.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Make the checkpoint unless it is there; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint_dir", type=Path, default=Path("checkpoints/demo/tiny-llama"), help="folder to make (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (%(default)s)")
    args = parser.parse_args(argv)
    directory = args.checkpoint_dir
    if all((directory / name).is_file() for name in FILES):
        print(f"{directory} is complete already and stays as it is; remove it to make it anew")
        return 0
    try:
        make_checkpoint(directory, args.seed)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"made {directory}; next: python scripts/convert_hf_checkpoint.py --checkpoint_dir {directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
