"""Whether a converted model computes what transformers computes from the same files. The only user of transformers."""

import gc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_sft.args import ConvertArgs
from lit_sft.checkpoint import load_model
from lit_sft.config import ModelConfig
from lit_sft.convert import convert_checkpoint, source_weights
from lit_sft.documents import read_json
from lit_sft.errors import InputError, RunFailed
from lit_sft.families.bookkeeping import QUANTIZATION
from lit_sft.layout import HF_CONFIG, MANIFEST, resolve_checkpoint_dir
from lit_sft.weight_files import adapter_note, choose_weights

TOKENS = 256
TOLERANCE = 1e-4
"""Of the largest logit. In fp32 the order in which sums are taken moves logits by about 1e-6 of it in small models and
1e-5 in large ones; a misplaced matrix or a switch that was not read by more than 1e-3."""
IGNORED_THERE = ("rope_condense_ratio",)  # fields of config.json that transformers does not know


def convert_verified(args: ConvertArgs) -> Path:
    """``convert_checkpoint``, and then the logits of both models on fixed ids compared, in fp32, one after the other.

    Raises InputError, before anything is written, when transformers is missing, does not know the architecture without
    code from the repository, or would not fit into memory; RunFailed when the logits differ, the converted files then
    counting as unconverted.
    """
    directory = resolve_checkpoint_dir(args.checkpoint_dir)
    _check_files(directory)
    hf_config = _config_of_transformers(directory)
    n_bytes = sum(4 * torch.Size(w.shape).numel() for w in source_weights(directory))
    free = _free_memory()
    if free is not None and n_bytes > free:
        raise InputError(
            f"--verify needs about {n_bytes / 1e9:.1f} GB of memory for {directory} in fp32, {free / 1e9:.1f} GB are "
            "free; leave it out, or verify where there is room"
        )
    convert_checkpoint(args)
    try:
        difference, largest = _compare(directory, hf_config, getattr(torch, args.dtype) if args.dtype else None)
        if not difference <= TOLERANCE * largest:  # a NaN is no match either
            raise RunFailed(
                f"{directory} computes other logits than transformers: they differ by up to {difference:.2g}, "
                f"more than {TOLERANCE:.0e} of the largest, {largest:.2g}; {MANIFEST} was removed, so that nothing "
                "uses the converted files; please report the config.json"
            )
    except BaseException:
        (directory / MANIFEST).unlink(missing_ok=True)
        raise
    print(f"verified: {TOKENS} positions, logits up to {largest:.2g}, largest difference {difference:.1e}")
    return directory


def _check_files(directory: Path) -> None:
    """InputError where transformers would load other weights than are converted here."""
    if passed := choose_weights(directory).passed:
        raise InputError(
            f"--verify: transformers would stop at {directory / passed[0].lead} ({passed[0].problem}); delete that "
            "file, or leave --verify out"
        )
    if note := adapter_note(directory):
        raise InputError(f"--verify: in {directory} {note}; move it away, or leave --verify out")


def _config_of_transformers(directory: Path) -> Any:
    """What transformers makes of config.json; InputError when it knows no such model."""
    content = read_json(directory / HF_CONFIG)
    if unknown := [name for name in IGNORED_THERE if content.get(name)]:
        raise InputError(
            f"--verify: transformers ignores {unknown[0]} and would compute something else; leave --verify out"
        )
    try:
        from transformers import AutoConfig, __version__
        from transformers.utils import logging
    except ImportError:
        raise InputError("--verify needs transformers: pip install 'lit-sft[verify]'; or leave it out") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        for name in QUANTIZATION:  # what converts is in full precision, and is compared so
            for part in (config, config.get_text_config()):
                part.__dict__.pop(name, None)
        known = _auto_model(config) is not None
    except (ValueError, KeyError, OSError):
        known = False
    if not known:
        raise InputError(
            f"--verify: transformers {__version__} has no {content.get('architectures') or content.get('model_type')} "
            "without code from the repository, which is never run; leave --verify out"
        )
    return config


def _auto_model(hf_config: Any) -> Any:
    """The class that loads what a config of transformers describes, multimodal models too; None: it has none."""
    import transformers

    for kind in ("CausalLM", "ImageTextToText", "MultimodalLM"):
        auto_model = getattr(transformers, f"AutoModelFor{kind}", None)
        if auto_model is not None and type(hf_config) in auto_model._model_mapping:
            return auto_model
    return None


def _compare(directory: Path, hf_config: Any, dtype: torch.dtype | None) -> tuple[float, float]:
    """The largest difference of two logits, and the largest logit."""
    rows = ModelConfig.from_dir(directory).vocab_size
    if hf_config.get_text_config().vocab_size != rows:
        hf_config.get_text_config().vocab_size = rows  # transformers does not load weights of another size
    with torch.no_grad():
        try:
            reference = _auto_model(hf_config).from_pretrained(
                directory, config=hf_config, dtype=torch.float32, trust_remote_code=False, local_files_only=True
            )
        except (KeyError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise InputError(f"--verify: transformers cannot load it ({problem:.300}); leave --verify out") from None
        reference.eval()
        if dtype is not None:  # the converted weights were rounded
            for parameter in reference.parameters():
                parameter.copy_(parameter.to(dtype))
        ids = fixed_ids(reference.get_input_embeddings().weight.shape[0])
        expected = reference(input_ids=ids, use_cache=False).logits
        del reference
        gc.collect()
        logits = load_model(directory, dtype=torch.float32)(ids)
    if logits.shape != expected.shape:
        raise RunFailed(f"{directory} has logits {tuple(logits.shape)}, transformers {tuple(expected.shape)}")
    return float((logits - expected).abs().max()), float(expected.abs().max())


def fixed_ids(vocab_size: int) -> Tensor:
    """Ids from all over the vocabulary, in an order that is no sequence: (1, TOKENS) int64."""
    return (torch.arange(TOKENS) * 97 % TOKENS * vocab_size // TOKENS)[None]


def _free_memory() -> int | None:
    """Bytes that the system says are available; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
