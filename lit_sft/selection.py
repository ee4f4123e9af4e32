"""Which examples make the data, in which order: a pure function of what was measured of each and of the flags."""

from dataclasses import dataclass

import numpy as np
import torch

from lit_sft.errors import InputError
from lit_sft.measures import SCHEME
from lit_sft.mixing import MixedSource
from lit_sft.prepare_args import PrepareArgs


@dataclass(frozen=True)
class Selection:
    """What becomes of the examples of a spool.

    Attributes:
        train: (n_train,) int64, the examples to train on, in their order; a repeated one is there several times.
        val: (n_val,) int64.
        candidates: (N,) bool, the examples that only their length, a weight or a cap could still leave out.
        dropped: (n_dropped,) int64, those that are too long.
        counts: for each source, how many examples each rule left out, and how many leaked.
    """

    train: np.ndarray
    val: np.ndarray
    candidates: np.ndarray
    dropped: np.ndarray
    counts: list[dict[str, int]]


class _Ledger:
    """The examples still in, and for each source how many each rule left out."""

    def __init__(self, source: np.ndarray, n_sources: int) -> None:
        self.source, self.kept = source, np.ones(len(source), bool)
        self.counts: list[dict[str, int]] = [{} for _ in range(n_sources)]

    def count(self, rule: str, examples: np.ndarray) -> None:
        for counts, n in zip(self.counts, np.bincount(self.source[examples], minlength=len(self.counts)), strict=True):
            counts[rule] = counts.get(rule, 0) + int(n)

    def sizes(self, of: np.ndarray | bool = True) -> list[int]:
        """How many of each source are still in, among those ``of``."""
        return np.bincount(self.source[self.kept & of], minlength=len(self.counts)).tolist()

    def leave_out(self, rule: str, fails: np.ndarray) -> np.ndarray:
        """Apply a rule to those still in; gives those (indices) that it leaves out."""
        out = np.flatnonzero(self.kept & fails)
        self.count(rule, out)
        self.kept[out] = False
        return out


def select(
    rows: np.ndarray, signatures: np.ndarray, sources: list[MixedSource], args: PrepareArgs, limit: int, block_size: int
) -> Selection:
    """Filter, remove duplicates, apply the length limit, mix, split and order.

    Args:
        rows: (N,) ``spool.ROW``, in the order of sources and rows.
        signatures: (N, P) uint32; P = 0 unless near duplicates are to be found.
        sources: what is particular to each.
        args: the rules and the seed.
        limit: most tokens of an example.
        block_size: the model's context, beyond which no limit is advised.

    Raises InputError when no example is left, or the overflow rule refuses one.
    """
    ledger = _Ledger(rows["source"], len(sources))
    for rule, fails in _filters(rows, sources, args).items():
        ledger.leave_out(rule, fails)
    if args.deduplicate != "none":
        ledger.leave_out("duplicates", _repeated(rows["text"], ledger.kept))
    if args.deduplicate == "near":
        ledger.leave_out("near_duplicates", _similar(signatures, ledger.kept, args.near_duplicate_similarity))
    if not ledger.kept.any():
        told = {rule: sum(counts[rule] for counts in ledger.counts) for rule in ledger.counts[0]}
        rules = ", ".join(f"{n} {rule.replace('_', ' ')}" for rule, n in told.items() if n)
        raise InputError(f"no example is left; left out were: {rules}; relax those rules")
    candidates = ledger.kept.copy()
    fits = rows["n_needed"] <= limit
    lost = ledger.leave_out("dropped", ~(fits | ((args.on_overflow == "truncate") & (rows["n_kept"] > 0))))
    if len(lost) and (args.on_overflow != "drop" or not ledger.kept.any()):
        raise _overflow(rows[lost], int((candidates & ~fits).sum()), sources, args.on_overflow, limit, block_size)
    caps = [s.max_examples for s in sources]
    ledger.leave_out("not_drawn", _all_but(caps, rows["source"], ledger.kept, args.seed, 0))
    sizes = [split_size(n, s.val_split_fraction) for n, s in zip(ledger.sizes(), sources, strict=True)]
    held_out = ledger.kept & ~_all_but(sizes, rows["source"], ledger.kept, args.seed, 1)
    weighed = _by_weight(ledger.sizes(~held_out), sources)
    ledger.leave_out("not_drawn", _all_but(weighed, rows["source"], ledger.kept & ~held_out, args.seed, 2))
    _leakage(rows, ledger, held_out, args.on_leakage)
    train, val = np.flatnonzero(ledger.kept & ~held_out), np.flatnonzero(ledger.kept & held_out)
    train, val = _ordered(train, rows, sources, args), _ordered(val, rows, None, args)
    return Selection(train, val, candidates, lost, ledger.counts)


def split_size(n: int, fraction: float) -> int:
    """How many of ``n`` examples are held out: of two or more both splits get one, but for a fraction of 0 or 1."""
    if fraction == 1:
        return n
    return max(0, min(max(int(n * fraction), fraction > 0), n - 1))


def _filters(rows: np.ndarray, sources: list[MixedSource], args: PrepareArgs) -> dict[str, np.ndarray]:
    """Rule → which examples fail it, of the rules that are asked for."""
    rules = {}
    if any(source.scores is not None for source in sources):
        rules["low_score"] = np.zeros(len(rows), bool)
        for i, source in enumerate(sources):
            if source.scores is not None:
                mine = rows["source"] == i
                rules["low_score"][mine] = source.scores[rows["row"][mine] - 1] < source.min_score
    response = rows["length"] - rows["n_prompt"]
    limits = {
        "too_short": (args.min_tokens, rows["length"].__lt__),
        "too_long": (args.max_tokens, rows["length"].__gt__),
        "short_response": (args.min_response_tokens, response.__lt__),
        "few_letters": (args.min_alphanumeric_share, rows["alphanumeric"].__lt__),
        "repetitive": (args.max_repetition_share, rows["repetition"].__gt__),
    }
    return rules | {rule: fails(limit) for rule, (limit, fails) in limits.items() if limit is not None}


def _repeated(hashes: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Those whose hash an earlier one that is kept has."""
    mine = np.flatnonzero(kept)
    repeated = np.zeros(len(kept), bool)
    repeated[mine] = True
    repeated[mine[np.unique(hashes[mine], return_index=True)[1]]] = False
    return repeated


def _similar(signatures: np.ndarray, kept: np.ndarray, threshold: float) -> np.ndarray:
    """Those whose estimated Jaccard similarity to an earlier one that stays reaches ``threshold``.

    Locality-sensitive hashing finds whom to compare with (Indyk & Motwani 1998); memory: about 8 KB an example.
    """
    from datasketch import LeanMinHash, MinHashLSH

    index = MinHashLSH(threshold, num_perm=signatures.shape[1])
    similar = np.zeros(len(kept), bool)
    for i in np.flatnonzero(kept).tolist():
        signature = LeanMinHash(seed=1, hashvalues=signatures[i], scheme=SCHEME)
        others = np.array(index.query(signature), np.int64)
        similar[i] = bool(((signatures[others] == signatures[i]).mean(1) >= threshold).any()) if len(others) else False
        if not similar[i]:
            index.insert(i, signature, check_duplication=False)
    return similar


def _overflow(
    lost: np.ndarray, n_long: int, sources: list[MixedSource], rule: str, limit: int, block_size: int
) -> InputError:
    """Why the rows ``lost``, of ``n_long`` that are too long, cannot be had, and what would help."""
    if rule == "drop":
        shortest = lost["n_needed"].min()
        return InputError(f"--max_seq_length {limit}: no example is left; the shortest has {shortest} tokens")
    needed = int((lost["n_prompt"] + 1 if rule == "truncate" else lost["n_needed"]).max())
    what = "keep no label when cut" if rule == "truncate" else "are longer than that"
    places = ", ".join(f"{sources[row['source']].stream.name} row {row['row']}" for row in lost[:3])
    return InputError(
        f"--max_seq_length {limit}: {len(lost)} examples {what} ({places}{', …' if len(lost) > 3 else ''}); "
        + (f"--max_seq_length {needed} keeps" if needed <= block_size else f"only a context of {needed} would keep")
        + f" all, --on_overflow drop leaves out all {n_long} that are too long"
    )


def _by_weight(there: list[int], sources: list[MixedSource]) -> list[int | None]:
    """How many training examples of each source keep the weights, with none drawn twice; None: all."""
    if sources[0].weight is None:
        return [None] * len(sources)
    if 0 in there:
        raise InputError(f"{sources[there.index(0)].stream.name} has no example left to give its weight to")
    total = min(n * s.repeat / s.weight for n, s in zip(there, sources, strict=True))
    return [min(n, max(1, round(total * s.weight / s.repeat))) for n, s in zip(there, sources, strict=True)]


def _all_but(numbers: list[int | None], source: np.ndarray, kept: np.ndarray, seed: int, purpose: int) -> np.ndarray:
    """Of those kept, all but a random ``numbers[i]`` of source i; none of it where that is None."""
    others = np.zeros(len(kept), bool)
    for i, n in enumerate(numbers):
        mine = np.flatnonzero(kept & (source == i))
        if n is not None:
            others[mine[_permutation(len(mine), seed, i, purpose)[n:]]] = True
    return others


def _leakage(rows: np.ndarray, ledger: _Ledger, held_out: np.ndarray, rule: str) -> None:
    """Count the val examples whose prompt is in train too, and leave them, move them to train, or leave them out."""
    train, val = ledger.kept & ~held_out, ledger.kept & held_out
    for name, hashes in (("leaked_exactly", rows["prompt"]), ("leaked", rows["question"])):
        known, mine = np.sort(hashes[train]), np.flatnonzero(val)
        place = np.searchsorted(known, hashes[mine])
        leaked = mine[known[np.minimum(place, len(known) - 1)] == hashes[mine]]
        ledger.count(name, leaked)
    if rule == "move":
        held_out[leaked] = False
    elif rule == "drop":
        ledger.kept[leaked] = False


def _ordered(
    examples: np.ndarray, rows: np.ndarray, sources: list[MixedSource] | None, args: PrepareArgs
) -> np.ndarray:
    """``examples``, which ascend, in the order asked for, as often as their ``sources`` say."""
    by_source = [examples[rows["source"][examples] == i] for i in range(int(rows["source"].max()) + 1)]
    if args.order == "source":
        by_source = [mine[_permutation(len(mine), args.seed, i, 3)] for i, mine in enumerate(by_source)]
    repeats = [1] * len(by_source) if sources is None else [source.repeat for source in sources]
    found = np.concatenate([np.tile(mine, repeat) for mine, repeat in zip(by_source, repeats, strict=False)])
    if args.order == "length":
        return found[np.argsort(rows["n_kept"][found], kind="stable")]
    return found[_permutation(len(found), args.seed, 0, 4)] if args.order == "shuffle" else found


def _permutation(n: int, seed: int, source: int, purpose: int) -> np.ndarray:
    generator = torch.Generator().manual_seed((seed * 1009 + source) * 8 + purpose)
    return torch.randperm(n, generator=generator).numpy()
