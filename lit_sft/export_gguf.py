"""Ours → one GGUF file for llama.cpp: weights, shape and tokenizer; one tensor in memory at a time.

Source: the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md) and, for what each architecture computes,
llama.cpp. Its ``llama`` turns neighbouring dimensions of a head by RoPE, ours and the Hub's the first with the second
half: the rows of queries and keys are reordered on the way.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from lit_sft.args import ExportGGUFArgs
from lit_sft.atomic import replacing
from lit_sft.config import ModelConfig
from lit_sft.errors import InputError
from lit_sft.export import Source, open_source
from lit_sft.gguf_traits import ARCHITECTURES, check_traits
from lit_sft.gguf_vocabulary import KINDS, read_vocabulary
from lit_sft.layout import check_new
from lit_sft.rope import inverse_frequencies
from lit_sft.tokenizer import Tokenizer
from lit_sft.weights import Weight

NAMES = {
    "wte": "token_embd",
    "norm_f": "output_norm",
    "lm_head": "output",
    "norm_1": "attn_norm",
    "attn.query": "attn_q",
    "attn.key": "attn_k",
    "attn.value": "attn_v",
    "attn.projection": "attn_output",
    "attn.query_norm": "attn_q_norm",
    "attn.key_norm": "attn_k_norm",
    "post_norm_1": "post_attention_norm",
    "norm_2": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
    "mlp.router": "ffn_gate_inp",
    "mlp.experts.gate": "ffn_gate_exps",
    "mlp.experts.up": "ffn_up_exps",
    "mlp.experts.down": "ffn_down_exps",
    "post_norm_2": "post_ffw_norm",
}
"""Our names, without ``blocks.N.`` → GGUF's, behind ``blk.N.`` there."""


def export_gguf(args: ExportGGUFArgs) -> Path:
    """Write ``args.out_file``; InputError, having written nothing, for what llama.cpp would compute otherwise."""
    try:
        import gguf
    except ImportError:
        raise InputError("the gguf package is missing; pip install 'lit-sft[gguf]'") from None
    out = check_new(args.out_file, "out_file")
    if out.is_dir():
        raise InputError(f"--out_file {out} is a folder; name a file in it")
    source = open_source(args.checkpoint_dir, args.lora_path, None)
    if source.family.gguf is None:
        raise InputError(f"{source.directory}: llama.cpp has no architecture for the {source.family.name} family")
    check_traits(source.config, source.family.gguf)
    weights = gguf_weights(source.weights, source.config, source.family.gguf)
    writer = gguf.GGUFWriter(None, source.family.gguf)
    writer.add_name(source.directory.name)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if args.quantize == "f32" else f"MOSTLY_{args.quantize.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(gguf, writer, source.config, source.family.gguf)
    _add_tokenizer(writer, source)
    types = {weight.name: _type(gguf, weight, args.quantize) for weight in weights}
    for weight in weights:
        block, size = gguf.GGML_QUANT_SIZES[types[weight.name]]
        n_bytes = torch.Size(weight.shape).numel() // block * size
        writer.add_tensor_info(weight.name, weight.shape, None, n_bytes, raw_dtype=types[weight.name])
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        try:
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for weight in weights:
                writer.write_tensor_data(gguf.quantize(weight.load().float().numpy(), types[weight.name]))
        finally:
            writer.close()
    print(f"saved {out}: {source.family.gguf}, {len(weights)} tensors, matrices in {args.quantize}")
    return out


def gguf_weights(weights: list[Weight], config: ModelConfig, architecture: str) -> list[Weight]:
    """Our weights as GGUF's: renamed, rows reordered, fused or stacked as the architecture wants them."""
    kind, names = ARCHITECTURES[architecture], dict(NAMES)
    if kind.fused_qkv:
        names |= dict.fromkeys(("attn.query", "attn.key", "attn.value"), "attn_qkv")
    if kind.fused_gate:
        names |= dict.fromkeys(("mlp.gate", "mlp.up"), "ffn_up")
    if kind.norms_of_attention and config.parallel_residual and not config.shared_norm:
        names |= {"norm_1": "attn_norm_2", "norm_2": "attn_norm"}
    parts: dict[str, list[tuple[tuple[int, int], Weight]]] = {}
    for weight in weights:
        block, ours, end = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)", weight.name).groups()
        expert = int(number[1]) if (number := re.search(r"experts\.(\d+)", ours)) else 0
        ours = re.sub(r"experts\.\d+", "experts", ours)
        if kind.interleaved and ours in ("attn.query", "attn.key"):
            weight = _changed(weight, partial(_interleaved, head_size=config.head_size))
        if config.norm_unit_offset and "norm" in ours:
            weight = _changed(weight, _offset)
        name = f"blk.{block}.{names[ours]}.{end}" if block else f"{names[ours]}.{end}"
        parts.setdefault(name, []).append(((list(NAMES).index(ours), expert), weight))
    found = [_joined(name, [w for _, w in sorted(of, key=lambda part: part[0])]) for name, of in parts.items()]
    if kind.own_head and config.tie_embeddings:
        found.append(replace(next(weight for weight in weights if weight.name == "wte.weight"), name="output.weight"))
    return found + [Weight(k, tuple(t.shape), t.dtype, lambda t=t: t) for k, t in _rope_factors(config).items()]


def _changed(weight: Weight, change: Callable[[Tensor], Tensor]) -> Weight:
    return replace(weight, load=lambda: change(weight.load()))


def _interleaved(rows: Tensor, head_size: int) -> Tensor:
    """Rows (heads · D, …) of a query or key: the two of each pair that RoPE turns, next to each other."""
    return rows.unflatten(0, (-1, 2, head_size // 2)).transpose(1, 2).flatten(0, 2)


def _offset(weight: Tensor) -> Tensor:
    """A norm's weight that is stored as its difference from 1, whole."""
    return weight.float() + 1


def _joined(name: str, parts: list[Weight]) -> Weight:
    """One tensor of several: experts become a dimension of their own, fused layers are one behind the other."""
    first = parts[0]
    if "_exps." in name:
        shape = (len(parts), *first.shape)
        return Weight(name, shape, first.dtype, lambda: torch.stack([part.load() for part in parts]))
    if len(parts) == 1:
        return replace(first, name=name)
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return Weight(name, shape, first.dtype, lambda: torch.cat([part.load() for part in parts]))


def _rope_factors(config: ModelConfig) -> dict[str, Tensor]:
    """What llama.cpp divides each pair's frequency by, for scalings that it does not compute itself."""
    if config.rope_type == "llama3":
        plain = inverse_frequencies(replace(config, rope_type="default"))
        return {"rope_freqs.weight": plain / inverse_frequencies(config)}
    if config.rope_type == "longrope":
        factors = {"long": config.rope_long_factors, "short": config.rope_short_factors}
        return {f"rope_factors_{key}.weight": torch.tensor(values) for key, values in factors.items()}
    return {}


def _type(gguf: ModuleType, weight: Weight, quantize: str) -> object:
    """Vectors, norms and routers are f32; a row that does not fill blocks of q8_0 is f16."""
    kinds = gguf.GGMLQuantizationType
    if len(weight.shape) < 2 or "norm" in weight.name or "gate_inp" in weight.name:
        return kinds.F32
    return kinds.F16 if quantize == "q8_0" and weight.shape[-1] % 32 else kinds[quantize.upper()]


def _add_shape(gguf: ModuleType, writer: object, config: ModelConfig, architecture: str) -> None:
    """The shape and switches that llama.cpp reads."""
    context = config.block_size
    if any(config.sliding_layers) and config.sliding_window < context:
        if ARCHITECTURES[architecture].windows:
            writer.add_sliding_window(config.sliding_window)
            writer.add_sliding_window_pattern(list(config.sliding_layers))
        else:
            context = config.sliding_window
            print(f"notice: llama.cpp's {architecture!r} has no window; the context is cut to its {context} tokens")
    writer.add_context_length(context)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_query_groups)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_parallel_residual(config.parallel_residual)
    (writer.add_layer_norm_rms_eps if config.norm == "rms" else writer.add_layer_norm_eps)(config.norm_eps)
    if config.n_expert:
        writer.add_expert_count(config.n_expert)
        writer.add_expert_used_count(config.n_expert_per_token)
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if config.attention_softcap:
        writer.add_attn_logit_softcapping(config.attention_softcap)
    if config.logits_softcap:
        writer.add_final_logit_softcapping(config.logits_softcap)
    writer.add_rope_dimension_count(config.turned)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_local_theta:
        writer.add_rope_freq_base_swa(config.rope_local_theta)
    if config.rope_type in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[config.rope_type.upper()])
        writer.add_rope_scaling_factor(config.rope_factor)
    if config.rope_type in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(config.rope_original_block_size)
    if config.rope_type == "longrope":
        writer.add_rope_scaling_attn_factors(config.rope_attention_factor)


def _add_tokenizer(writer: object, source: Source) -> None:
    """Tokens, how texts are cut and merged, and where sequences begin and end."""
    tokenizer = Tokenizer(source.directory)
    vocabulary = read_vocabulary(tokenizer, source.config.vocab_size)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.space_prefix)
    if KINDS["unknown"] in vocabulary.kinds:
        writer.add_unk_token_id(vocabulary.kinds.index(KINDS["unknown"]))
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    if tokenizer.eos_id is not None:
        writer.add_eos_token_id(tokenizer.eos_id)
    pad = tokenizer.token_id(tokenizer.special_tokens.get("pad_token", ""))
    if pad is not None and pad < source.config.vocab_size:
        writer.add_pad_token_id(pad)
    ends = {*tokenizer.stop_ids, *source.facts.get("stop_ids", ())} - {tokenizer.eos_id}
    if ends:
        writer.add_eot_token_id(min(ends))
    writer.add_add_bos_token(tokenizer.adds_bos)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
