"""Which files of a folder hold its weights, in the order in which transformers looks for them.

Source: transformers 5's ``_get_resolved_checkpoint_files``: the file that config.json names as ``transformers_weights``
alone; else model.safetensors, its index, pytorch_model.bin, its index. Variants (model.fp16.safetensors), subfolders
and consolidated.safetensors are never read unasked, there and here.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_sft.documents import read_json
from lit_sft.errors import InputError
from lit_sft.layout import HF_CONFIG, HF_INDEX, HF_PICKLE, HF_PICKLE_INDEX, HF_WEIGHTS

ORDER = (HF_WEIGHTS, HF_INDEX, HF_PICKLE, HF_PICKLE_INDEX)
NAMED_IN_CONFIG = "transformers_weights"
OURS = ("lit_model", "adapter")
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
SHOWN = 3  # names on one line


@dataclass(frozen=True)
class WeightFiles:
    """One set of files that hold a model's weights."""

    lead: str
    """The file that decides: an index, or the only one."""
    files: tuple[str, ...]
    """Those with tensors, in order."""
    tensors: tuple[str, ...] = ()
    """The names of the tensors that an index promises."""
    problem: str | None = None
    """Why they cannot be read."""


@dataclass(frozen=True)
class Choice:
    """The set of files that is read, and what lies beside it."""

    read: WeightFiles
    passed: tuple[WeightFiles, ...]
    """Sets that transformers would have read first, and which have a problem."""
    ignored: tuple[str, ...]
    """Other files of weights, as they are to be named."""

    def note(self, directory: Path) -> str | None:
        """One line about what is read and what is ignored; None where there is one set only."""
        if not self.passed and not self.ignored:
            return None
        parts = [f"{directory}: {self.read.lead} is read"]
        parts += [f"{bad.lead} is ignored ({bad.problem})" for bad in self.passed]
        if self.ignored:
            parts.append(f"{_listed(self.ignored)} ignored, in transformers' order; delete what is stale")
        return "; ".join(parts)


def adapter_note(directory: Path) -> str | None:
    """One line about an adapter of peft in the folder, which transformers would put on the model; None without one."""
    present = [name for name in PEFT_FILES if (directory / name).is_file()]
    if not present:
        return None
    return f"{present[0]} is an adapter of peft, which is not applied here: merge it there, or import it"


def choose_weights(directory: Path) -> Choice:
    """The first set of files that is whole, in transformers' order.

    InputError, naming the file to fetch or to remove, when no set is.
    """
    sets = _sets(directory)
    whole = [candidate for candidate in sets if candidate.problem is None]
    if not whole:
        raise InputError(_advice(directory, sets))
    read = whole[0]
    position = sets.index(read)
    return Choice(read, tuple(sets[:position]), _ignored(directory, read, sets[:position], sets[position + 1 :]))


def _ignored(
    directory: Path, read: WeightFiles, earlier: list[WeightFiles], later: list[WeightFiles]
) -> tuple[str, ...]:
    """The names of all files of weights that are not read, the deciding ones first; sets passed over have theirs."""
    others = set(weight_names(directory)) - {read.lead, *read.files}
    for candidate in earlier:
        others -= {candidate.lead, *candidate.files}
    leads = []
    for candidate in later:
        names_only_what_is_read = candidate.files and set(candidate.files) <= set(read.files)
        if not names_only_what_is_read:
            leads.append(candidate.lead)
        others.discard(candidate.lead)
    return (*leads, *sorted(others))


def weight_names(directory: Path) -> list[str]:
    """Every file of the folder that may hold weights of a whole model, or be their index; none of ours."""
    names: set[str] = set()
    for pattern in ("*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json", "pytorch_model*.index.json"):
        names |= {path.name for path in directory.glob(pattern) if path.is_file()}
    return sorted(name for name in names if not name.startswith(OURS))


def missing_files(directory: Path) -> list[str]:
    """The files that the folder lacks of the first set that it has a part of; none where a set is whole."""
    sets = _sets(directory)
    if any(candidate.problem is None for candidate in sets):
        return []
    if not sets:
        return [HF_WEIGHTS]
    absent = [name for name in sets[0].files if not (directory / name).is_file()]
    return absent or ["a readable weight index"]


def _sets(directory: Path) -> list[WeightFiles]:
    """The sets that the folder has at least the deciding file of, first the one that transformers would take."""
    config = read_json(directory / HF_CONFIG) if (directory / HF_CONFIG).is_file() else {}
    name = config.get(NAMED_IN_CONFIG)
    if not name:
        return [_describe(directory, lead) for lead in ORDER if (directory / lead).is_file()]
    if not isinstance(name, str) or not re.fullmatch(r"[^/\\]+\.safetensors(\.index\.json)?", name):
        raise InputError(
            f"{directory / HF_CONFIG}: {NAMED_IN_CONFIG} is {name!r:.80}, no safetensors file of {directory}, and no "
            "index of one; mend it"
        )
    if (directory / name).is_file():
        return [_describe(directory, name)]
    problem = f"{directory / name} is missing, though config.json names it as {NAMED_IN_CONFIG}"
    return [WeightFiles(name, (name,), problem=problem)]


def _describe(directory: Path, lead: str) -> WeightFiles:
    """The set that a file decides, which is there."""
    if not lead.endswith(".index.json"):
        return WeightFiles(lead, (lead,))
    path = directory / lead
    try:
        weight_map = read_json(path).get("weight_map")
    except InputError as error:
        return WeightFiles(lead, (), problem=str(error))
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        return WeightFiles(lead, (), problem=f"{path} has no weight_map of names to files")
    names = tuple(sorted(set(weight_map.values())))
    if outside := [name for name in names if Path(name).name != name]:
        return WeightFiles(lead, (), problem=f"{path} names {outside[0]!r}, which is not a file of {directory}")
    problem = None
    if absent := [name for name in names if not (directory / name).is_file()]:
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        problem = f"{directory / absent[0]}{more} is missing, though the index names it"
    return WeightFiles(lead, names, tuple(sorted(weight_map)), problem)


def _advice(directory: Path, sets: list[WeightFiles]) -> str:
    """Why nothing can be read, and what to fetch or to remove."""
    if sets:
        first = sets[0]
        stale = f"remove {first.lead}" if (directory / first.lead).is_file() else f"remove {NAMED_IN_CONFIG} there"
        return f"{first.problem}; download again to resume, or {stale} if it is stale"
    present = weight_names(directory)
    nothing = f"{directory} holds no {HF_WEIGHTS} or {HF_PICKLE}, whole or sharded"
    shards = [name for name in present if re.search(r"-\d+-of-\d+\.(safetensors|bin)$", name)]
    if shards:
        index = HF_INDEX if shards[0].endswith(".safetensors") else HF_PICKLE_INDEX
        return f"{nothing}: {_listed(shards)} shards without {index}; fetch that"
    if present:
        return f"{nothing}: {_listed(present)} no file that is read unasked; download {HF_WEIGHTS}, or rename it so"
    below = sorted(path.parent for path in directory.glob("*/*") if path.name in ORDER)
    if below:
        return f"{nothing}; {below[0]} does, which is not looked into: move its files here, or give that folder"
    return f"{nothing}; download it first"


def _listed(names: Sequence[str]) -> str:
    """Up to three names with their verb."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more} {'is' if len(names) == 1 else 'are'}"
