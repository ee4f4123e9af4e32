"""SmolLM3: Llama with layers that do not turn queries and keys.

Source: transformers' SmolLM3Config and SmolLM3ForCausalLM.
"""

from lit_sft.config import ModelConfig
from lit_sft.families.family import Family
from lit_sft.families.fields import Fields
from lit_sft.families.layers import read_window
from lit_sft.families.llama import read_bias, read_shape, weight_map


def read(fields: Fields) -> ModelConfig:
    """ModelConfig of a SmolLM3 config.json."""
    fields.only("hidden_act", "silu", "swish")
    shape = read_shape(fields, block_size=32768, tied=True, theta=2e6)
    n_layer, interval = shape["n_layer"], fields.get("no_rope_layer_interval", default=4)
    # despite the name, 1 in the list is a layer that turns them
    listed = fields.get("no_rope_layers", default=[(layer + 1) % interval != 0 for layer in range(n_layer)])
    rope = tuple(map(bool, listed[:n_layer]))
    used = fields.get("use_sliding_window", default=False)
    return ModelConfig(
        **shape,
        **read_bias(fields),
        mlp_bias=fields.get("mlp_bias", default=False),
        **read_window(fields, n_layer, lambda layer: not rope[layer], used=used),
        rope_layers=() if all(rope) else rope,
    )


FAMILY = Family(
    name="SmolLM3",
    architectures=("SmolLM3ForCausalLM",),
    model_types=("smollm3",),
    read=read,
    weight_map=weight_map,
    gguf="smollm3",
)
