import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_hf_llama

from lit_sft import Tokenizer, load_model
from lit_sft.args import ConvertArgs, GenerateArgs, LoRAArgs
from lit_sft.checkpoint import adapter_facts, save_adapter
from lit_sft.convert import convert_checkpoint
from lit_sft.errors import InputError
from lit_sft.generate import answers, generate, next_token
from lit_sft.lora import apply_lora


def test_greedy_decoding_is_that_of_transformers(tmp_path: Path) -> None:
    reference = make_hf_llama(tmp_path)
    model = load_model(convert_checkpoint(ConvertArgs(checkpoint_dir=str(tmp_path))))
    for seed in range(3):
        prompt = torch.randint(3, 400, (1, 12), generator=torch.Generator().manual_seed(seed))
        theirs = reference.generate(prompt, max_new_tokens=40, do_sample=False, eos_token_id=2, pad_token_id=0)
        expected = theirs[0, 12:].tolist()
        expected = expected[: expected.index(2)] if 2 in expected else expected
        assert list(generate(model, prompt[0].tolist(), 40, {2})) == expected


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"temperature": 1.0, "top_k": None, "top_p": 1.0}, 5),
        ({"temperature": 1.0, "top_k": 2, "top_p": 1.0}, 2),
        ({"temperature": 1.0, "top_k": None, "top_p": 0.7}, 2),
        ({"temperature": 1.0, "top_k": None, "top_p": 0.4}, 1),
        ({"temperature": 1.0, "top_k": 4, "top_p": 0.81}, 3),
        ({"temperature": 0.5, "top_k": None, "top_p": 1.0}, 5),
    ],
)
def test_sampling_draws_from_the_narrowed_distribution(settings: dict, allowed: int) -> None:
    """Frequencies of 4,000 draws against the probabilities written out: 0.5, 0.25, 0.15, 0.07, 0.03, shuffled."""
    probabilities = torch.tensor([0.07, 0.5, 0.03, 0.25, 0.15])
    logits, generator = probabilities.log() + 3.0, torch.Generator().manual_seed(0)
    draws = torch.tensor([next_token(logits, **settings, generator=generator) for _ in range(4000)])
    expected = probabilities ** (1 / settings["temperature"])
    kept = expected.argsort(descending=True)[:allowed]
    expected = torch.zeros(5).index_copy(0, kept, expected[kept])
    frequencies = draws.bincount(minlength=5) / len(draws)
    assert (frequencies - expected / expected.sum()).abs().max() < 0.03
    assert set(draws.tolist()) == set(kept.tolist())


def test_temperature_zero_takes_the_likeliest() -> None:
    assert next_token(torch.tensor([0.1, 3.0, 2.9]), 0.0, None, 1.0, None) == 1


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="not finite"):
        next_token(torch.tensor([0.1, float("nan"), 2.9]), 1.0, None, 1.0, torch.Generator())


def test_it_ends_at_the_context_and_refuses_prompts_that_fill_it(tmp_path: Path) -> None:
    make_hf_llama(tmp_path, max_position_embeddings=32)
    model = load_model(convert_checkpoint(ConvertArgs(checkpoint_dir=str(tmp_path))))
    assert len(list(generate(model, [5] * 30, 100, ()))) == 2
    for prompt in ([5] * 32, []):
        with pytest.raises(InputError, match="the model takes 1 to 31"):
            list(generate(model, prompt, 1, ()))


def test_it_stops_before_a_stop_id(tmp_path: Path) -> None:
    make_hf_llama(tmp_path)
    model = load_model(convert_checkpoint(ConvertArgs(checkpoint_dir=str(tmp_path))))
    free = list(generate(model, [1, 7, 8], 20, ()))
    assert list(generate(model, [1, 7, 8], 20, {free[5]})) == free[: free.index(free[5])]


def text_of(args: GenerateArgs) -> list[str]:
    return ["".join(stream) for stream in answers(args)]


def test_answers_use_the_style_and_stop_ids_that_the_run_saved(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    base = checkpoint()
    model, tokenizer, lora = load_model(base), Tokenizer(base), LoRAArgs()
    apply_lora(model, lora, 0)
    alpaca = tokenizer.encode(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nHello\n\n### Response:\n"
    )
    free = list(generate(model.eval(), alpaca, 30, ()))
    save_adapter(
        tmp_path / "adapter", model, lora, adapter_facts(base, {"prompt_style": "alpaca", "stop_ids": [free[9]]})
    )
    asked = GenerateArgs(prompt="Hello", adapter_dir=str(tmp_path / "adapter"), temperature=0, max_new_tokens=30)
    assert text_of(asked) == [tokenizer.decode(free[: free.index(free[9])])]
    plain = GenerateArgs(prompt="Hello", checkpoint_dir=str(base), temperature=0, max_new_tokens=30)
    assert text_of(plain) == [tokenizer.decode(list(generate(model, tokenizer.encode("Hello"), 30, {2})))]


def test_seeds_decide_the_samples(checkpoint: Callable[..., Path]) -> None:
    settings = {"checkpoint_dir": str(checkpoint()), "num_samples": 2, "max_new_tokens": 15}
    first = text_of(GenerateArgs(**settings))
    assert first == text_of(GenerateArgs(**settings)) and first[0] != first[1]
    assert first != text_of(GenerateArgs(**settings, seed=1))


def test_the_command_streams_and_reads_standard_input(checkpoint: Callable[..., Path]) -> None:
    base = checkpoint()
    command = [sys.executable, str(ROOT / "scripts/generate.py"), f"--checkpoint_dir={base}", "--prompt=-"]
    command += ["--temperature=0", "--max_new_tokens=12"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, input="Hello", capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    asked = GenerateArgs(prompt="Hello", checkpoint_dir=str(base), temperature=0, max_new_tokens=12)
    assert run.stdout == text_of(asked)[0] + "\n"
