"""Sampling with a KV cache."""

import sys
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from lit_sft.args import GenerateArgs
from lit_sft.atomic import Manifest
from lit_sft.checkpoint import load_model, read_adapter_config, resolve_base
from lit_sft.config import ModelConfig
from lit_sft.errors import InputError
from lit_sft.layout import MANIFEST, only_checkpoint_dir
from lit_sft.model import GPT, KVCache
from lit_sft.prompts import Message, check_prompt_facts, resolve_style, with_system
from lit_sft.rope import turned_anew
from lit_sft.runtime import BASE_DTYPE, pick_device
from lit_sft.samples import check_ids, default_style, encode_prompt, stop_ids
from lit_sft.shards import Shards
from lit_sft.styles import AS_WRITTEN, PLAIN
from lit_sft.tokenizer import Tokenizer

SAMPLE_PROMPT = "What food do llamas eat?"
MOST_TYPED = 10**7  # characters read of standard input, beyond any model's context
SAMPLE_TOKENS = 64
SHOWN_TOKENS = 24  # of the prompt, whose beginning is the style's and always the same


def next_token(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator | None
) -> int:
    """Choose one id from logits (vocab_size,): the likeliest at temperature 0, else drawn.

    ``top_k`` and then ``top_p`` (Holtzman et al. 2019, arXiv 1904.09751) narrow the choice; the likeliest always stays.
    """
    if temperature == 0:
        return int(logits.argmax())
    logits, order = (logits.float() / temperature).sort(descending=True, stable=True)
    if top_k is not None:
        logits, order = logits[:top_k], order[:top_k]
    probabilities = logits.softmax(-1)
    if not probabilities.isfinite().all():
        raise InputError("the model's logits are not finite: its weights are damaged, or overflow in its dtype")
    before = probabilities.cumsum(-1) - probabilities  # the mass of the likelier ones
    probabilities = torch.where(before < top_p, probabilities, 0.0)
    return int(order[torch.multinomial(probabilities.cpu(), 1, generator=generator).to(order.device)])


@torch.no_grad()
def generate(
    model: GPT,
    prompt_ids: list[int],
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield new ids one by one, until a stop id (not yielded), ``max_new_tokens`` or the model's context.

    Args:
        model: in eval mode.
        prompt_ids: at least one.
        max_new_tokens: most ids yielded.
        stop_ids: ids that end an answer.
        temperature: 0 takes the likeliest id each time; otherwise ``next_token``'s.
        top_k: as in ``next_token``.
        top_p: as in ``next_token``.
        generator: of the draws, on the CPU, so that a seed gives the same draws on every device.

    Raises InputError when the prompt is empty or fills the context.
    """
    room = model.config.block_size - len(prompt_ids)
    if not prompt_ids or room < 1:
        raise InputError(f"the prompt has {len(prompt_ids)} tokens; the model takes 1 to {model.config.block_size - 1}")
    steps = min(max_new_tokens, room)
    weight = model.wte.weight
    cache = KVCache(model.config, 1, len(prompt_ids) + steps, weight.device, weight.dtype)
    ids, new = list(prompt_ids), prompt_ids
    for _ in range(steps):
        if turned_anew(model.config, cache.length, len(ids)):
            cache.length, new = 0, ids
        hidden = model.hidden_states(torch.tensor([new], device=weight.device), cache=cache)
        token = next_token(model.logits(hidden[0, -1]), temperature, top_k, top_p, generator)
        if token in stop_ids:
            return
        yield token
        new = [token]
        ids.append(token)


def sampler(
    model: GPT, tokenizer: Tokenizer, prompt: str | None, shards: Shards, context: Callable
) -> Callable[[int], str]:
    """A function that lets the model answer a fixed prompt greedily, to watch it learn.

    The prompt is ``prompt`` in the style of ``shards``; without one it is their first example up to its first label.
    ``context`` is entered around the model, for mixed precision. InputError, before any step, for one that is too long.
    """
    ids, mask = shards[0]
    n_prompt = int(mask.int().argmax())
    if prompt is None and n_prompt > 1:
        prompt_ids = ids[:n_prompt].tolist()
    else:
        messages = with_system((Message("user", prompt or SAMPLE_PROMPT),), shards.manifest.facts.get("system_prompt"))
        prompt_ids = encode_prompt(messages, shards.manifest.facts["prompt_style"], tokenizer)
        check_ids(prompt_ids, model.config.vocab_size, tokenizer)
    if len(prompt_ids) >= model.config.block_size:
        raise InputError(
            f"--sample_prompt has {len(prompt_ids)} tokens; the model takes 1 to {model.config.block_size - 1}"
        )
    question = _one_line(tokenizer.decode(prompt_ids[-SHOWN_TOKENS:]))

    def sample(step: int) -> str:
        model.eval()
        with context():
            answer = list(generate(model, prompt_ids, SAMPLE_TOKENS, shards.manifest.facts["stop_ids"]))
        return f"  asked: … {question}\n  answer: {_one_line(tokenizer.decode(answer))}"

    return sample


def _one_line(text: str) -> str:
    """The text for a terminal: an untrained model also writes characters that would move the cursor."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


def _typed() -> str:
    """What comes on standard input; InputError where that is closed, without end, or no text."""
    try:
        text = sys.stdin.read(MOST_TYPED) if sys.stdin else ""
        text.encode()  # in the C locale what is no text comes in disguise
    except ValueError as error:
        raise InputError(f"--prompt -: standard input is no UTF-8 text ({error}); convert it") from None
    if not 0 < len(text) < MOST_TYPED:
        raise InputError(
            f"--prompt -: standard input is {'too long' if text else 'empty or closed'}; give it the prompt"
        )
    return text


def answers(args: GenerateArgs) -> Iterator[Iterator[str]]:
    """For each of ``args.num_samples`` answers the pieces of its text, as they are made.

    Raises InputError when model, adapter or prompt do not allow it.
    """
    adapter = read_adapter_config(args.adapter_dir) if args.adapter_dir else {}
    if adapter or args.checkpoint_dir:
        checkpoint_dir = resolve_base(args.checkpoint_dir, adapter)
    else:
        checkpoint_dir = only_checkpoint_dir()
    tokenizer = Tokenizer(checkpoint_dir)
    trained = adapter or Manifest.read(checkpoint_dir).facts
    check_prompt_facts(trained, checkpoint_dir / MANIFEST)
    style = resolve_style(args.prompt_style) if args.prompt_style else trained.get("prompt_style")
    style = style or default_style(tokenizer, otherwise=PLAIN)
    system = trained.get("system_prompt") if args.system_prompt is None else args.system_prompt
    if style == AS_WRITTEN and system:
        raise InputError(
            "the model was trained on texts as they are written, without a place for --system_prompt; write it into "
            "--prompt"
        )
    ends = trained.get("stop_ids") or (tokenizer.stop_ids if style == PLAIN else stop_ids(style, tokenizer))
    prompt = _typed() if args.prompt == "-" else args.prompt
    prompt_ids = encode_prompt(with_system((Message("user", prompt, args.input),), system), style, tokenizer)
    check_ids(prompt_ids, ModelConfig.from_dir(checkpoint_dir).vocab_size, tokenizer)
    device = pick_device(args.device)
    dtype = BASE_DTYPE[args.precision] if args.precision else None if device == "cuda" else torch.float32
    model = load_model(checkpoint_dir, args.adapter_dir, dtype, device)
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(args.num_samples):
        ids = generate(
            model, prompt_ids, args.max_new_tokens, ends, args.temperature, args.top_k, args.top_p, generator
        )
        yield tokenizer.stream(ids)
