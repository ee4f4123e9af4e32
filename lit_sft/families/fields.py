"""The fields of a config.json, and the refusal of those that would change the computation unread."""

from collections.abc import Collection
from typing import Any

from lit_sft.errors import InputError
from lit_sft.families.bookkeeping import BOOKKEEPING

OFF = """
    add_bias_linear add_cross_attention add_qkv_bias alibi apply_residual_connection_post_layernorm attention_bias
    attention_chunk_size attention_k_eq_v attention_out_bias attention_qk_norm attention_sinks attention_window
    attention_window_size attn_logit_softcap attn_logit_softcapping attn_output_gate attn_qkv_bias attn_scale
    attn_temperature_tuning bias clip_qkv dense_attention_every_n_layers embedding_size enable_bias
    enable_moe_block final_logit_softcap final_logit_softcapping first_k_dense_replace
    hidden_size_per_layer_input input_jitter_noise interleaved_sliding_window is_encoder_decoder kv_lora_rank
    layer_scale lm_head_bias local_attention local_attention_window logits_soft_cap mlp_bias moe_intermediate_size
    moe_num_experts multi_query mup_enabled n_routed_experts n_shared_experts new_decoder_architecture no_bias
    no_rope_layer_interval norm_bias num_experts num_kv_shared_layers num_local_experts num_shared_experts o_bias
    output_logit_soft_cap parallel_attn parallel_block parallel_residual proj_bias q_lora_rank qk_layernorm
    qk_norm qkv_bias query_key_norm rope_interleave rope_interleaved rope_traditional rotary_emb_interleaved
    rotary_interleaved router_jitter_noise router_logit_softcapping scale_attn_by_inverse_layer_idx
    scale_embedding shared_expert_intermediate_size shared_intermediate_size sliding_window sliding_window_pattern
    tie_word_embeddings use_attention_sinks use_bias use_biases use_bidirectional_attention use_cla
    use_dynamic_ntk use_expert_bias use_layer_scale use_logn_attn use_mrope use_parallel_residual use_post_norm
    use_qk_layernorm use_qk_norm use_qkv_bias use_sliding_window window_size zero_expert_num
"""
ONE = """
    attention_in_multiplier attention_out_multiplier attention_value_scale embed_scale embedding_multiplier
    embedding_scale interpolate_factor key_multiplier lm_head_multiplier logit_scale logits_scaling moe_layer_freq
    mup_attn_multiplier mup_embedding_multiplier mup_width_multiplier no_rope_layers output_multiplier_scale
    partial_rotary_factor residual_multiplier rope_condense_ratio rope_pct rope_ratio rotary_pct rotary_percentage
    rotary_scaling_factor routed_scaling_factor scale_emb width_multiplier
"""
ABSENT = """
    attention_multiplier attention_scale attn_config audio_config block_configs compression_config
    cross_attention_layers dim_model_base dual_chunk_attention_config ffn_config global_rope_theta
    hidden_activation interleave_moe_layer_step layer_rope_theta local_rope_theta mlp_only_layers moe_layers
    normalization_type num_attention_heads_per_layer num_key_value_heads_per_layer num_ln_in_parallel_attn
    quantization quantization_config query_pre_attn_scalar rope_local_base_freq rope_parameters rope_scaling
    rope_theta_local rotary_dim scale_depth softmax_scale swiglu_alpha swiglu_limit vision_config
"""
NEUTRAL: dict[str, tuple] = {
    **dict.fromkeys(OFF.split(), (None, False, 0, 0.0, "")),
    **dict.fromkeys(ONE.split(), (None, 1, 1.0)),
    **dict.fromkeys(ABSENT.split(), (None,)),
    "decoder_sparse_step": (None, 1),
    "full_attn_mod": (None, 0, 1),
    "hidden_act": (None, "silu", "swish"),
    "is_causal": (None, True),
    "layer_norm_elementwise_affine": (None, True),
    "layer_types": (None, "full_attention"),
    "mlp_layer_types": (None, "dense"),
    "per_layer_config": (None, {}),
    "position_embedding_type": (None, "absolute", "rope", "rotary"),
    "rope_theta": (None, 10000, 10000.0),
    "rotary_emb_base": (None, 10000, 10000.0),
    "scale_attn_weights": (None, True),
    "scoring_func": (None, "softmax"),
    "use_rope": (None, True),
    "use_rotary": (None, True),
}
"""Fields that change the computation in some architecture, and the values, of a list each, with which they do not."""
COUNTS = """
    ffn_hidden_size head_dim hidden_size intermediate_size max_position_embeddings moe_intermediate_size n_embed n_head
    n_head_kv n_layer num_attention_heads num_experts num_experts_per_tok num_heads num_hidden_layers
    num_key_value_heads num_kv_heads num_local_experts vocab_size
""".split()  # noqa: SIM905 (a list of that many lines)
LARGEST = dict.fromkeys(("n_layer", "num_hidden_layers"), 10_000)  # lists of all layers are made of it
OBJECTS = {"rope_parameters", "rope_scaling"}


class Fields:
    """A config.json that remembers which of its fields were read."""

    def __init__(self, content: dict) -> None:
        self.content = content
        self.read: set[str] = set()
        self.notes: list[str] = []
        """What is to be said of fields that are there and not computed."""

    def get(self, *names: str, default: Any = None) -> Any:
        """The value of a field that may have several spellings; null is absent."""
        self.read |= set(names)
        name = next((name for name in names if self.content.get(name) is not None), None)
        if name is None:
            return default
        value = self.content[name]
        most = LARGEST.get(name, 2**31)
        if name in COUNTS and (type(value) is not int or not 1 <= value <= most):
            raise InputError(f"config.json: {name} is {value!r:.40}; it must be a positive integer, at most {most:,}")
        if name in OBJECTS and not isinstance(value, dict):
            raise InputError(f"config.json: {name} is {value!r}; it must be an object")
        return value

    def given(self, name: str, default: Any) -> Any:
        """The value as it stands, where null means something else than an absent field, which is ``default``."""
        self.read.add(name)
        return self.content.get(name, default)

    def need(self, *names: str) -> Any:
        """The value of a field that must be there; InputError when it is not."""
        value = self.get(*names)
        if value is None:
            raise InputError(f"config.json: {names[0]!r} is missing")
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """InputError unless the field is absent, null or one of the values that are supported."""
        value = self.get(name)
        if value is not None and value not in allowed:
            hint = f"; supported: {', '.join(map(repr, allowed))}" if allowed else ""
            raise InputError(f"config.json: {name} = {value!r} is not supported{hint}")

    def activation(self, *names: str, default: str) -> str:
        """Our name of the activation; InputError for one that is not supported."""
        known = {
            "silu": "silu",
            "swish": "silu",
            "gelu": "gelu",
            "gelu_python": "gelu",
            "gelu_new": "gelu_tanh",
            "gelu_fast": "gelu_tanh",
            "gelu_accurate": "gelu_tanh",
            "gelu_python_tanh": "gelu_tanh",
            "gelu_pytorch_tanh": "gelu_tanh",
        }
        value = self.get(*names, default=default)
        if value not in known:
            raise InputError(f"config.json: {names[0]} = {value!r} is not supported; supported: {', '.join(known)}")
        return known[value]

    def check_unknown(self, family: str, accepted: Collection[str]) -> None:
        """InputError for a field of which it is not known whether it changes the computation.

        ``accepted``: fields that a person knows to change nothing. Null, false and what is empty mean that a field is
        not used.
        """
        # sizes: those of the weights are compared with what was read
        known = self.read | NEUTRAL.keys() | BOOKKEEPING | {*COUNTS, *accepted}
        unknown = {name: value for name, value in self.content.items() if name not in known and not _is_unused(value)}
        if unknown:
            told = ", ".join(f"{name} = {value!r:.60}" for name, value in unknown.items())
            raise InputError(
                f"config.json: {told}: nobody here knows whether that changes what the {family} family computes; if "
                f"you know that it does not, convert with --accept_config_key {','.join(unknown)}"
            )

    def check_known(self, family: str, accepted: Collection[str]) -> None:
        """InputError for a field that the family did not read, that changes some computation and is not neutral."""
        for name, neutral in NEUTRAL.items():
            value = self.content.get(name)
            values = value if isinstance(value, list) else [value]  # of each layer its own
            if name not in self.read and name not in accepted and any(v not in neutral for v in values):
                hint = "; take the unquantized weights" if name.startswith("quantization") else ""
                hint = hint or f"; if you know that it changes nothing, convert with --accept_config_key {name}"
                raise InputError(f"config.json: {name} = {value!r} is not supported for the {family} family{hint}")


def _is_unused(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})
