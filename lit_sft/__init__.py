"""lit_sft: supervised fine-tuning you can read in an afternoon.

The Python door: ``from lit_sft import load_model, Tokenizer``. Names are resolved on first use, so that importing
the package (every command's ``--help`` does) imports no torch.
"""

__version__ = "0.1.0"

_HOMES = {
    "load_model": "lit_sft.checkpoint",
    "Tokenizer": "lit_sft.tokenizer",
    "GPT": "lit_sft.model",
    "KVCache": "lit_sft.model",
    "ModelConfig": "lit_sft.config",
    "InputError": "lit_sft.errors",
}
__all__ = ["GPT", "InputError", "KVCache", "ModelConfig", "Tokenizer", "__version__", "load_model"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'lit_sft' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
