"""Multimodal architectures whose text model is a family here, with what is particular to each.

Source: transformers' modeling files, and conversion_mapping.py for the names in files of before and after. Without
images or sounds each computes what its text model alone does, which makes one of these; PaliGemma, whose prompts look
ahead, and Llama 3.2 Vision, which has layers of its own among those of the text model, do not.
"""

from lit_sft.families.family import Wrapper

TEXT_MODEL = {"module": "model.text_model.", "prefixes": ("model.text_model.",)}
QWEN = ("model.language_model.", "model.")

WRAPPERS = (
    Wrapper("Gemma3ForConditionalGeneration", "gemma3", "gemma3_text"),
    Wrapper("Mistral3ForConditionalGeneration", "mistral3", "mistral"),
    Wrapper("LlavaForConditionalGeneration", "llava", "llama"),
    Wrapper("LlavaNextForConditionalGeneration", "llava_next", "llama"),
    Wrapper("LlavaOnevisionForConditionalGeneration", "llava_onevision", "qwen2"),
    Wrapper("VipLlavaForConditionalGeneration", "vipllava", "llama"),
    Wrapper("InternVLForConditionalGeneration", "internvl", "qwen2"),
    Wrapper("VoxtralForConditionalGeneration", "voxtral", "llama"),
    Wrapper("Idefics3ForConditionalGeneration", "idefics3", "llama", **TEXT_MODEL),
    Wrapper("SmolVLMForConditionalGeneration", "smolvlm", "llama", **TEXT_MODEL),
    Wrapper("Qwen2VLForConditionalGeneration", "qwen2_vl", "qwen2_vl_text", prefixes=QWEN, same_as="qwen2"),
    Wrapper("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", "qwen2_5_vl_text", prefixes=QWEN, same_as="qwen2"),
    Wrapper("Qwen3VLForConditionalGeneration", "qwen3_vl", "qwen3_vl_text", prefixes=QWEN, same_as="qwen3"),
)
