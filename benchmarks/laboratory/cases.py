"""Cases that are looked at: shapes, kinds of weights and rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lit_sft.config import ModelConfig

SEVEN_B = {"n_embd": 4096, "n_head": 32, "n_query_groups": 32, "head_size": 128, "intermediate_size": 11008}
SMALL = {"n_embd": 256, "n_head": 8, "n_query_groups": 4, "head_size": 32, "intermediate_size": 704}
EVERY_OTHER = (False, True, False, True)  # so that block 1 has what the case is about


@dataclass(frozen=True)
class Case:
    """One model and how it is trained."""

    shape: dict
    """Fields of ModelConfig."""
    n_layer: int = 2
    quantize: str | None = None
    share_prefix: bool = False
    checkpoint_every: int = 0
    more: dict = field(default_factory=dict)
    """Further fields of ModelConfig."""

    def config(self) -> ModelConfig:
        """The model's config, of a Llama but for what the case changes."""
        from lit_sft.config import ModelConfig  # of the project that is looked at

        fields = {"block_size": 2048, "vocab_size": 32000, "n_layer": self.n_layer}
        return ModelConfig(**fields | self.shape | self.more)


CASES = {
    "bf16": Case(SEVEN_B),
    "bf16 grouped": Case(SEVEN_B | {"n_query_groups": 8}),
    "bf16 shared": Case(SEVEN_B, share_prefix=True),
    "bf16 checkpointing": Case(SEVEN_B, checkpoint_every=1),
    "fp8": Case(SEVEN_B, quantize="fp8"),
    "nf4": Case(SEVEN_B, quantize="nf4"),
    "experts": Case(SMALL, more={"n_expert": 8, "n_expert_per_token": 2}),
    "window": Case(SMALL, 4, more={"sliding_window": 128, "sliding_layers": EVERY_OTHER}),
    "no rope": Case(SMALL, 4, more={"rope_layers": tuple(not x for x in EVERY_OTHER)}),
    "softcap": Case(SMALL, more={"attention_softcap": 50.0}),
    "alibi": Case(SMALL, more={"alibi": True, "rotary_size": 0}),
    "qk norm": Case(SMALL, more={"qk_norm": "head"}),
}
