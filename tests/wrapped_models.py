"""Tiny random multimodal models of every wrapper, around text models of several families."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from family_variants import GEMMA3, MOE, QWEN3, SHAPE, gemma3_rope

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CLIP = {"vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 32}, "image_token_index": 157}
SIGLIP = {"vision_config": VISION | {"model_type": "siglip_vision_model"}, "image_token_index": 157}
INTERN = {"vision_config": VISION | {"image_size": [28, 28], "patch_size": [14, 14]}, "image_token_id": 157}
SOUND = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
SAM = {"hidden_size": 32, "output_channels": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64}
SAM |= {"global_attn_indexes": [0], "mlp_dim": 48}
PERCEIVER = {"hidden_size": 64, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2}
PERCEIVER |= {"resampler_head_dim": 16, "num_key_value_heads": 2}
DEPTH = {"depth": 1, "num_heads": 2}
QWEN_TOWER = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
GROUPED = {"num_key_value_heads": 2}
OLD, NEW = "language_model.model.", "model.language_model."
QWEN = ("model.", NEW)
MROPE = GROUPED | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}


@dataclass
class Wrapped:
    """One wrapper around one text model."""

    name: str
    """transformers' name of the wrapper, before Config and ForConditionalGeneration."""
    text: dict
    """On top of SHAPE; with a model_type, but for Gemma 3's."""
    outer: dict = field(default_factory=dict)
    """The wrapper's own fields."""
    spellings: tuple[str, ...] = (OLD, NEW)
    """What published files name the text model's weights by; the first is what transformers 5 writes."""


def text(kind: str, **config: object) -> dict:
    return {"model_type": kind, **GROUPED, **config}


WRAPPED = {
    "gemma3": Wrapped(
        "Gemma3",
        GEMMA3 | gemma3_rope(1e4, rope_type="linear", factor=8.0),
        {"vision_config": VISION, "mm_tokens_per_image": 4}
        | {"image_token_index": 157, "boi_token_index": 158, "eoi_token_index": 159},
    ),
    "mistral3": Wrapped(
        "Mistral3",
        text("mistral", sliding_window=None, head_dim=24),
        {"vision_config": VISION | {"model_type": "pixtral"}, "image_token_index": 157, "tie_word_embeddings": False},
    ),
    "mistral3 tied": Wrapped(
        "Mistral3",
        text("mistral", sliding_window=8),
        {"vision_config": VISION | {"model_type": "pixtral"}, "image_token_index": 157, "tie_word_embeddings": True},
    ),
    "llava of llama": Wrapped("Llava", text("llama"), CLIP),
    "llava of phi3": Wrapped("Llava", text("phi3"), CLIP),
    "llava next of mistral": Wrapped("LlavaNext", text("mistral", sliding_window=None), CLIP),
    "llava next video": Wrapped("LlavaNextVideo", text("llama"), CLIP),
    "video llava": Wrapped("VideoLlava", text("llama"), CLIP | {"video_token_index": 158}),
    "got ocr 2": Wrapped(
        "GotOcr2",
        text("qwen2"),
        {"vision_config": SAM, "image_token_index": 157, "tie_word_embeddings": False},
    ),
    "deepseek vl": Wrapped(
        "DeepseekVL", text("llama"), {"vision_config": VISION, "tie_word_embeddings": False}, (NEW,)
    ),
    "llava onevision of qwen2": Wrapped("LlavaOnevision", text("qwen2"), SIGLIP),
    "llava onevision of qwen2, tied": Wrapped(
        "LlavaOnevision", text("qwen2", tie_word_embeddings=True), SIGLIP | {"tie_word_embeddings": True}
    ),
    "vipllava": Wrapped("VipLlava", text("llama"), CLIP | {"vision_feature_layers": [-1]}),
    "internvl of qwen3": Wrapped("InternVL", text("qwen3", **QWEN3), INTERN | {"tie_word_embeddings": False}),
    "internvl of qwen3-moe": Wrapped(
        "InternVL", text("qwen3_moe", **MOE, norm_topk_prob=True), INTERN | {"tie_word_embeddings": False}
    ),
    "llava of mixtral": Wrapped("Llava", text("mixtral", num_local_experts=4, sliding_window=None), CLIP),
    "internvl of qwen2": Wrapped("InternVL", text("qwen2"), INTERN | {"tie_word_embeddings": False}),
    "voxtral": Wrapped("Voxtral", text("llama"), {"audio_config": SOUND}, (OLD,)),
    "qwen2-vl": Wrapped("Qwen2VL", MROPE, {"vision_config": {**DEPTH, "hidden_size": 64, "embed_dim": 32}}, QWEN),
    "qwen2.5-vl": Wrapped("Qwen2_5_VL", MROPE, {"vision_config": {**DEPTH, **QWEN_TOWER}}, QWEN),
    "qwen2.5-vl tied": Wrapped(
        "Qwen2_5_VL", MROPE, {"vision_config": {**DEPTH, **QWEN_TOWER}, "tie_word_embeddings": True}, QWEN
    ),
    "qwen3-vl": Wrapped(
        "Qwen3VL",
        QWEN3 | {"rope_parameters": MROPE["rope_parameters"] | {"mrope_section": [4, 4, 4], "mrope_interleaved": True}},
        {"vision_config": {**DEPTH, **QWEN_TOWER, "deepstack_visual_indexes": [0]}},
        (NEW,),
    ),
    "idefics2": Wrapped(
        "Idefics2",
        text("mistral", sliding_window=None),
        {"vision_config": VISION, "image_token_id": 157, "perceiver_config": PERCEIVER},
        ("model.text_model.",),
    ),
    "idefics3": Wrapped(
        "Idefics3", text("llama"), {"vision_config": VISION, "image_token_id": 157}, ("model.text_model.",)
    ),
    "smolvlm": Wrapped(
        "SmolVLM", text("llama"), {"vision_config": VISION, "image_token_id": 157}, ("model.text_model.",)
    ),
}


def make_wrapped(directory: Path, wrapped: Wrapped, spelling: str | None = None, seed: int = 0) -> torch.nn.Module:
    """Save a random model as transformers does, its files under another spelling where one is given, and give it."""
    import transformers
    from safetensors.torch import load_file, save_file

    torch.manual_seed(seed)
    config = getattr(transformers, f"{wrapped.name}Config")(text_config=SHAPE | wrapped.text, **wrapped.outer)
    config._attn_implementation = config.text_config._attn_implementation = "eager"
    model = getattr(transformers, f"{wrapped.name}ForConditionalGeneration")(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(directory)
    path, saved = directory / "model.safetensors", wrapped.spellings[0]
    weights = load_file(path)
    assert any(name.startswith(saved) for name in weights)
    if spelling == NEW != saved:
        weights = {_newer(name): tensor for name, tensor in weights.items()}
        save_file(weights, path, {"format": "pt"})
    return model


def _newer(name: str) -> str:
    """The name of a weight as the modules are named since transformers 4.52."""
    if name.startswith(OLD):
        return NEW + name.removeprefix(OLD)
    if name.startswith("model."):
        return NEW + name.removeprefix("model.")
    if name == "lm_head.weight":
        return name
    return name.removeprefix("language_model.") if ".lm_head." in name else "model." + name
