"""What the tests share: tiny random Llama checkpoints as transformers saves them, and a tokenizer of their own."""

import csv
import datetime
import io
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import sentencepiece
import torch

ROOT = Path(__file__).parent.parent
# how long an example takes says more about the machine than about the code
hypothesis.settings.register_profile("lit_sft", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("lit_sft")
torch.set_num_threads(1)  # tiny models are slower on two


def instruction_texts() -> list[str]:
    with (ROOT / "demo" / "instructions.csv").open(newline="", encoding="utf-8") as file:
        return [cell for row in csv.reader(file) for cell in row if cell]


@pytest.fixture(scope="session")
def tokenizer_model() -> bytes:
    """A SentencePiece model of Llama's kind (BPE, byte fallback, dummy prefix), vocabulary 400."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(instruction_texts()),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    return model.getvalue()


LLAMA = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.125,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_hf_llama(directory: Path, tokenizer_model: bytes | None = None, seed: int = 0, **config: object) -> object:
    """Save a random Llama the way transformers does, norms and biases moved off their neutral values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **config})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(directory)
    if tokenizer_model is not None:
        (directory / "tokenizer.model").write_bytes(tokenizer_model)
    return model


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer_model: bytes) -> Callable[..., Path]:
    """``checkpoint(name, **config)`` makes and converts a tiny Llama; gives its directory."""

    def make(name: str = "tiny", **config: object) -> Path:
        from lit_sft.args import ConvertArgs
        from lit_sft.convert import convert_checkpoint

        directory = tmp_path / "checkpoints" / "test" / name
        make_hf_llama(directory, tokenizer_model, **config)
        return convert_checkpoint(ConvertArgs(checkpoint_dir=str(directory)))

    return make


@pytest.fixture
def day_of_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers writes the day of the clock into chat templates; here the one that lit_sft writes."""
    from transformers.utils import chat_template_utils

    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return datetime.datetime(2024, 7, 26, tzinfo=tz)

    monkeypatch.setattr(chat_template_utils, "datetime", Day)
