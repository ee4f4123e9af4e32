"""Which files of a folder hold its weights, in the order in which transformers looks for them.

Source: transformers 5's ``_get_resolved_checkpoint_files``: the file that config.json names as ``transformers_weights``
alone; else model.safetensors, its index, pytorch_model.bin, its index. Variants (model.fp16.safetensors), subfolders
and consolidated.safetensors are never read unasked, there and here.
"""

import re
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
    sets = [_describe(directory, lead) for lead in _leads(directory)]
    whole = next((found for found in sets if found.problem is None), None)
    if whole is None:
        raise InputError(_advice(directory, sets))
    rest = sets[sets.index(whole) + 1 :]
    leads = [found.lead for found in rest if not found.files or set(found.files) - set(whole.files)]
    of_no_set = {name for found in (whole, *sets) for name in (found.lead, *found.files)}
    shards = [name for found in rest for name in found.files if (directory / name).is_file()]
    others = {*shards, *(set(weight_names(directory)) - of_no_set)} - {*whole.files, *leads}
    return Choice(whole, tuple(sets[: sets.index(whole)]), (*leads, *sorted(others)))


def weight_names(directory: Path) -> list[str]:
    """Every file of the folder that may hold weights of a whole model, or be their index; none of ours."""
    patterns = ("*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json", "pytorch_model*.index.json")
    found = {path.name for pattern in patterns for path in directory.glob(pattern) if path.is_file()}
    return sorted(name for name in found if not name.startswith(OURS))


def missing_files(directory: Path) -> list[str]:
    """The files that the folder lacks of the first set that it has a part of; none where a set is whole."""
    sets = [_describe(directory, lead) for lead in _leads(directory)]
    if any(found.problem is None for found in sets):
        return []
    if not sets:
        return [HF_WEIGHTS]
    absent = [name for name in sets[0].files if not (directory / name).is_file()]
    return absent or ["a readable weight index"]


def _leads(directory: Path) -> list[str]:
    """The deciding files that are there, first the one that transformers would take."""
    config = read_json(directory / HF_CONFIG) if (directory / HF_CONFIG).is_file() else {}
    if named := config.get(NAMED_IN_CONFIG):
        if not isinstance(named, str) or not re.fullmatch(r"[^/\\]+\.safetensors(\.index\.json)?", named):
            raise InputError(
                f"{directory / HF_CONFIG}: {NAMED_IN_CONFIG} is {named!r:.80}, no safetensors file of {directory}, and "
                "no index of one; mend it"
            )
        return [named]
    return [name for name in ORDER if (directory / name).is_file()]


def _describe(directory: Path, lead: str) -> WeightFiles:
    if not lead.endswith(".index.json"):
        there = (directory / lead).is_file()
        return WeightFiles(
            lead, (lead,), (), None if there else f"{directory / lead} is missing, though config.json names it"
        )
    try:
        weight_map = read_json(directory / lead).get("weight_map")
    except InputError as error:
        return WeightFiles(lead, (), (), str(error))
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(v, str) for v in weight_map.values())):
        return WeightFiles(lead, (), (), f"{directory / lead} has no weight_map of names to files")
    names = tuple(sorted(set(weight_map.values())))
    problem = None
    if outside := [name for name in names if Path(name).name != name]:
        return WeightFiles(lead, (), (), f"{directory / lead} names {outside[0]!r}, which is not a file of {directory}")
    if absent := [name for name in names if not (directory / name).is_file()]:
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        problem = f"{directory / absent[0]}{more} is missing, though the index names it"
    return WeightFiles(lead, names, tuple(sorted(weight_map)), problem)


def _advice(directory: Path, sets: list[WeightFiles]) -> str:
    """Why nothing can be read, and what to fetch or to remove."""
    if sets:
        first = sets[0]
        remedy = f"download again to resume, or remove {first.lead} if it is stale"
        return f"{first.problem}; {remedy}"
    present = weight_names(directory)
    nothing = f"{directory} holds no {HF_WEIGHTS} or {HF_PICKLE}, whole or sharded"
    shards = [name for name in present if re.search(r"-\d+-of-\d+\.(safetensors|bin)$", name)]
    if shards:
        index = HF_INDEX if shards[0].endswith(".safetensors") else HF_PICKLE_INDEX
        return f"{nothing}: {_listed(shards)} shards without {index}; fetch that"
    if present:
        return f"{nothing}: {_listed(present)} no file that is read unasked; download {HF_WEIGHTS}, or rename it so"
    below = sorted(path.parent for path in directory.glob("*/*") if path.name in ORDER and path.is_file())
    if below:
        return f"{nothing}; {below[0]} does, which is not looked into: move its files here, or give that folder"
    return f"{nothing}; download it first"


def _listed(names: tuple[str, ...] | list[str]) -> str:
    """Up to three names with their verb."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more} {'is' if len(names) == 1 else 'are'}"
