"""Multimodal architectures whose text model is a family here, with what is particular to each.

Source: transformers' modeling files, and conversion_mapping.py for the names in files of before and after. Without
images or sounds each computes what its text model alone does, which makes one of these; PaliGemma, whose prompts look
ahead, and Llama 3.2 Vision, which has layers of its own among those of the text model, do not.
"""

from dataclasses import dataclass

from lit_sft.errors import InputError

OTHER_CONFIGS = ("vision_config", "audio_config")
ROPES = ("rope_scaling", "rope_parameters")


@dataclass(frozen=True)
class Wrapper:
    """A multimodal architecture around a text model; the rest of it, for images or sounds, is not read."""

    architecture: str
    """Its name in config.json's ``architectures``."""
    model_type: str
    """Its name in config.json's ``model_type``."""
    text_model_type: str
    """The ``model_type`` of a ``text_config`` that names none."""
    module: str = "model.language_model."
    """Where transformers 5 keeps the modules of the text model; the head is ``lm_head``."""
    prefixes: tuple[str, ...] = ("language_model.model.", "model.language_model.", "language_model.")
    """What the text model's weights are named by in files, instead of the family's prefix."""
    others: str = (
        r"(model\.)?((vision|image|video|audio)_tower|vision_model|visual|multi_modal_projector|connector|aligner|"
        r"image_newline)(\..*)?"
    )
    """Regular expression of the names of all other weights and modules."""
    same_as: str | None = None
    """The ``model_type`` that computes the same without images, of a text model with a name of its own."""
    tokenizer_class: str | None = None
    """As a family's: the class that transformers has for the wrapper's tokenizers, whatever its text model's is."""
    ties_as_text: bool = False
    """The head is tied where ``text_config`` says so, whatever the wrapper's own field says."""

    def text_of(self, hf_config: dict) -> dict:
        """The fields of the text model, as its own config.json would have them; InputError when there are none.

        Where ``same_as`` says so they may lie among the wrapper's, as in older files; positions that images would share
        out among a head's dimensions (mrope) are all the same in texts.
        """
        text = hf_config.get("text_config")
        if text is None and self.same_as:
            text = {key: value for key, value in hf_config.items() if key not in OTHER_CONFIGS}
        if not isinstance(text, dict):
            raise InputError(f"config.json: text_config is {text!r:.99}, not the object that {self.architecture} needs")
        kind = self.same_as or text.get("model_type", self.text_model_type)
        if self.same_as:
            text = text | {name: _without_sections(text[name]) for name in ROPES if isinstance(text.get(name), dict)}
        return text | {"model_type": kind}

    def outer_of(self, hf_config: dict) -> dict:
        """The wrapper's own fields, as far as they may say something about the text model."""
        outer = {key: value for key, value in hf_config.items() if key not in ("text_config", *OTHER_CONFIGS, *ROPES)}
        if self.ties_as_text and self.text_of(hf_config).get("tie_word_embeddings"):
            outer.pop("tie_word_embeddings", None)
        return outer

    def text_name(self, name: str, prefix: str) -> str:
        """The name that a weight or module of the text model has in the text model alone, whose prefix is ``prefix``.

        A name that is none of the text model's is given back as it is.
        """
        head = name.removeprefix("language_model.")
        if head.startswith("lm_head."):
            return head
        for start in self.prefixes:
            if name.startswith(start):
                return prefix + name.removeprefix(start)
        return name

    def file_name(self, text_name: str, prefix: str, start: str) -> str:
        """The way back: the name in a file that names the text model's weights by ``start``."""
        if text_name.startswith(prefix):
            return start + text_name.removeprefix(prefix)
        return "language_model." + text_name if start == "language_model.model." else text_name


def _without_sections(rope: dict) -> dict:
    """Rotary fields without the shares of a head's dimensions that positions in images have."""
    kept = {key: value for key, value in rope.items() if key not in ("mrope_section", "mrope_interleaved")}
    return {key: "default" if value == "mrope" else value for key, value in kept.items()}


AS_IT_IS = "TokenizersBackend"
# what several have in common
TEXT_MODEL = {"module": "model.text_model.", "prefixes": ("model.text_model.",)}
QWEN = {"prefixes": ("model.language_model.", "model."), "ties_as_text": True}

WRAPPERS = (
    Wrapper("Gemma3ForConditionalGeneration", "gemma3", "gemma3_text", tokenizer_class="GemmaTokenizer"),
    Wrapper("Mistral3ForConditionalGeneration", "mistral3", "mistral", tokenizer_class=AS_IT_IS),
    Wrapper("LlavaForConditionalGeneration", "llava", "llama", tokenizer_class=AS_IT_IS, ties_as_text=True),
    Wrapper("LlavaNextForConditionalGeneration", "llava_next", "llama", tokenizer_class=AS_IT_IS),
    Wrapper("LlavaNextVideoForConditionalGeneration", "llava_next_video", "llama"),
    Wrapper("VideoLlavaForConditionalGeneration", "video_llava", "llama"),
    Wrapper("LlavaOnevisionForConditionalGeneration", "llava_onevision", "qwen2", ties_as_text=True),
    Wrapper("VipLlavaForConditionalGeneration", "vipllava", "llama", tokenizer_class=AS_IT_IS),
    Wrapper("InternVLForConditionalGeneration", "internvl", "qwen2", tokenizer_class="Qwen2Tokenizer"),
    Wrapper("GotOcr2ForConditionalGeneration", "got_ocr2", "qwen2", tokenizer_class=AS_IT_IS),
    Wrapper("DeepseekVLForConditionalGeneration", "deepseek_vl", "llama"),
    Wrapper("VoxtralForConditionalGeneration", "voxtral", "llama", tokenizer_class=AS_IT_IS),
    Wrapper("Idefics2ForConditionalGeneration", "idefics2", "mistral", tokenizer_class="LlamaTokenizer", **TEXT_MODEL),
    Wrapper("Idefics3ForConditionalGeneration", "idefics3", "llama", **TEXT_MODEL),
    Wrapper("SmolVLMForConditionalGeneration", "smolvlm", "llama", tokenizer_class=AS_IT_IS, **TEXT_MODEL),
    Wrapper(
        "Qwen2VLForConditionalGeneration",
        "qwen2_vl",
        "qwen2_vl_text",
        tokenizer_class="Qwen2Tokenizer",
        same_as="qwen2",
        **QWEN,
    ),
    Wrapper(
        "Qwen2_5_VLForConditionalGeneration",
        "qwen2_5_vl",
        "qwen2_5_vl_text",
        tokenizer_class="Qwen2Tokenizer",
        same_as="qwen2",
        **QWEN,
    ),
    Wrapper(
        "Qwen3VLForConditionalGeneration",
        "qwen3_vl",
        "qwen3_vl_text",
        tokenizer_class="Qwen2Tokenizer",
        prefixes=QWEN["prefixes"],
        same_as="qwen3",
    ),
)
ANY = Wrapper("", "", "", prefixes=("language_model.model.", "model.language_model.", "model.text_model."))
"""A stand-in for whichever wrapper a text model was in, where only names are known."""
