"""The fields of a config.json, and the refusal of those that would change the computation unread."""

from collections.abc import Collection
from typing import Any

from lit_sft.config import ModelConfig
from lit_sft.errors import InputError
from lit_sft.families.bookkeeping import BOOKKEEPING, QUANTIZATION

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
    **dict.fromkeys(("causal", "is_causal", "use_causal_mask"), (None, True)),
    **dict.fromkeys(("elementwise_affine", "layer_norm_elementwise_affine"), (None, True)),
    "decoder_sparse_step": (None, 1),
    "full_attn_mod": (None, 0, 1),
    "hidden_act": (None, "silu", "swish"),
    "layer_types": (None, "full_attention"),
    "mlp_layer_types": (None, "dense"),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "position_embedding_type": (None, "absolute", "rope", "rotary"),
    "rope_theta": (None, 10000, 10000.0),
    "rotary_emb_base": (None, 10000, 10000.0),
    "scale_attn_weights": (None, True),
    "scoring_func": (None, "softmax"),
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

    def __init__(self, content: dict, accepted: Collection[str] = ()) -> None:
        """``accepted``: names of fields, or FIELD.KEY of a key in one, that a person knows to change nothing.

        They are taken as absent.
        """
        self.content = content
        for path in accepted:
            self.content = _without(self.content, path.split("."))
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

    def check_unread(self, family: str, config: ModelConfig, outer: Collection[str]) -> None:
        """InputError, with all of them, for fields that were not read and may change the computation.

        Null, false, what is empty, and a number of things that is 0 mean that a field of an unknown name is not used.

        Args:
            family: its name.
            config: what was read, which a field may say once more.
            outer: names around a multimodal model's text model that are known to say nothing of it.
        """
        neutral = neutral_values(config)
        # sizes: those of the weights are compared with what was read
        known = self.read | BOOKKEEPING | {*COUNTS, *outer}
        if self.content.get("use_sliding_window") is False:
            known |= {"sliding_window"}
            neutral.pop("sliding_window")
        changing, unknown = {}, {}
        for name, value in self.content.items():
            if name in neutral and name not in self.read:
                values = value if isinstance(value, list) else [value]  # of each layer its own
                if any(v not in neutral[name] for v in values):
                    changing[name] = value
            elif name not in known and not is_unused(value) and not _is_none_of(name, value):
                unknown[name] = value
        problems = [f"{_told(changing)} is not supported for the {family} family"] if changing else []
        if unknown:
            problems.append(f"{_told(unknown)}: the toolkit does not know whether that changes what the model computes")
        if problems:
            names = ",".join([*changing, *unknown])
            hint = f"if you know that it changes nothing, convert with --accept_config_key {names}"
            hint = "take the unquantized weights" if changing.keys() & {*QUANTIZATION} else hint
            raise InputError(f"config.json: {'; '.join(problems)}; {hint}")


def neutral_values(config: ModelConfig) -> dict[str, tuple]:
    """Values with which fields that a family does not read change nothing: NEUTRAL's, and what is computed anyway."""
    activations = {
        "silu": ("silu", "swish"),
        "gelu": ("gelu",),
        "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new"),
    }[config.activation]
    gated = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu"}[config.activation]
    norms = {
        "rms": ("rms", "rmsnorm", "rms_norm", "RMSNorm"),
        "layer": ("layer", "layernorm", "layer_norm", "LayerNorm"),
    }[config.norm]
    said = {name: (is_on,) for names, is_on in _switches(config).items() for name in names.split()}
    said |= {
        "activation": (*activations, gated) if config.gated_mlp else activations,
        "activation_function": activations,
        "head_dim": (config.head_size,),
        "hidden_act": activations,
        "moe_intermediate_size": (config.intermediate_size,),
        "norm_topk_prob": (config.normalize_experts,) if config.n_expert else (True, False),
        "norm_type": norms,
        "normalization_type": norms,
        "num_heads": (config.n_head,),
        "rotary_dim": (config.turned,),
        "sliding_window": (config.sliding_window,),
        "sliding_window_size": (config.sliding_window,),
        "window_size": (config.sliding_window,),
    }
    return NEUTRAL | {name: NEUTRAL.get(name, (None,)) + values for name, values in said.items()}


def _switches(config: ModelConfig) -> dict[str, bool]:
    """Names under which files say whether a model has something → whether it has."""
    biases = (config.qkv_bias, config.projection_bias, config.mlp_bias)
    return {
        "add_bias_linear bias enable_bias use_bias use_biases": all(biases),
        "add_qkv_bias attention_bias attn_qkv_bias qkv_bias use_qkv_bias": config.qkv_bias,
        "alibi": config.alibi,
        "attention_out_bias o_bias proj_bias": config.projection_bias,
        "attention_qk_norm qk_layernorm qk_norm query_key_norm use_qk_layernorm use_qk_norm": config.qk_norm != "none",
        "gated_mlp glu swiglu use_gated_mlp use_glu use_swiglu": config.gated_mlp,
        "mlp_bias": config.mlp_bias,
        "multi_query": config.n_query_groups == 1,
        "no_bias": not any(biases),
        "norm_bias": config.norm_bias,
        "parallel_attn parallel_block parallel_residual use_parallel_residual": config.parallel_residual,
        "pre_norm": config.pre_norm,
        "rms_norm use_rms_norm use_rmsnorm": config.norm == "rms",
        "rotary use_rope use_rotary use_rotary_emb use_rotary_embeddings use_rotary_pos_emb": config.turned > 0,
        "use_gqa": config.n_query_groups < config.n_head,
        "use_post_norm": config.post_norm,
        "use_sliding_window": any(config.sliding_layers),
    }


def _without(content: dict, path: list[str]) -> dict:
    """``content`` without the field at the end of a path of names; as it is where there is none."""
    name, *rest = path
    if not rest:
        return {key: value for key, value in content.items() if key != name}
    return content | {name: _without(content[name], rest)} if isinstance(content.get(name), dict) else content


def is_unused(value: Any) -> bool:
    """A field of an unknown name with this value is one that nothing uses."""
    return value is None or value is False or value in ("", [], {})


def _is_none_of(name: str, value: Any) -> bool:
    """The field counts something, of which there is none."""
    return name.startswith(("n_", "num_")) and value == 0


def _told(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {value!r:.60}" for name, value in fields.items())
