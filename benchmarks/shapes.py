"""The shapes that the benchmarks train, and how many floating-point operations their useful work takes."""

from dataclasses import dataclass

RANK, ALPHA = 16, 32  # of the adapter, on every linear layer of the blocks, on every side
BLOCK_SIZE = 2048


@dataclass(frozen=True)
class Shape:
    """A decoder-only model under transformers' names."""

    model_type: str
    """``llama`` or ``gpt_neox``."""
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    num_key_value_heads: int | None = None
    """Fewer than query heads (grouped-query attention); None: as many."""

    @property
    def n_kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    def hf_config(self) -> dict:
        """The fields of its config.json; weights drawn with this deviation can learn through a frozen head."""
        fields = {name: value for name, value in vars(self).items() if name != "model_type" and value is not None}
        extra = {"max_position_embeddings": BLOCK_SIZE, "tie_word_embeddings": False}
        return fields | extra | {"initializer_range": self.hidden_size**-0.5}

    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of each linear layer of a block, query, key and value apart."""
        d, wide = self.hidden_size, self.intermediate_size
        d_kv = d // self.num_attention_heads * self.n_kv_heads
        mlp = [(d, wide), (d, wide), (wide, d)] if self.model_type == "llama" else [(d, wide), (wide, d)]
        return [(d, d), (d, d_kv), (d, d_kv), (d, d), *mlp]

    def n_linear(self) -> int:
        """Weights of the blocks' linear layers."""
        return self.num_hidden_layers * sum(i * o for i, o in self.linears())

    def n_lora(self) -> int:
        """Weights of the adapter."""
        return self.num_hidden_layers * sum(RANK * (i + o) for i, o in self.linears())

    def flop_per_token(self, labelled: float, context: float) -> float:
        """What one useful token of a LoRA step costs: forward, gradient of the inputs, gradient of the adapter.

        Args:
            labelled: share of the tokens that have a label; the others need no logits.
            context: tokens that one attends to, on average.
        """
        head = self.hidden_size * self.vocab_size * labelled
        attention = 14 * self.hidden_size * context * self.num_hidden_layers  # scores computed twice, as flash does
        return 4 * (self.n_linear() + head) + 6 * self.n_lora() + attention


def mean_context(lengths: list[int]) -> float:
    """Tokens that one attends to, its own included, on average over examples of these lengths."""
    return sum(n * (n + 1) / 2 for n in lengths) / sum(lengths)


SHAPES = {
    "pythia-31m": Shape("gpt_neox", 256, 6, 8, 1024, 50304),
    "pythia-160m": Shape("gpt_neox", 768, 12, 12, 3072, 50304),
    "llama-100m": Shape("llama", 640, 12, 10, 1728, 50304),
    "tiny": Shape("llama", 64, 2, 4, 192, 512),
    "llama-7b": Shape("llama", 4096, 32, 32, 11008, 32000),
    "llama-0.5b": Shape("llama", 896, 24, 14, 4864, 151936, num_key_value_heads=2),
    "llama-65b": Shape("llama", 8192, 80, 64, 22016, 32000),
}
