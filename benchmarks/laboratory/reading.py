"""The text of Inductor's code, read: kernels, calls of libraries, and which of them only copy."""

import re
from collections import Counter

KERNEL = re.compile(r"^(triton_\w+) = async_compile\.triton\('\w+', '''\n(.*?)''', device_str='cuda'\)", re.S | re.M)
LAUNCH = re.compile(r"\b(triton_\w+)\.run\(")
CALL = re.compile(r"\b(?:extern_kernels\.(\w+)|torch\.ops\.([\w.]+?))\(")
ADDMM = re.compile(r"extern_kernels\.addmm\((.+)\)$", re.M)
VALUE = re.compile(r"^\s*tmp\d+ = (.+)$", re.M)
MOVED = re.compile(r"tl\.load\(.*\)(\.to\(tl\.\w+\))?$|tmp\d+(\.to\(tl\.\w+\))?$")


def kernels(code: str) -> dict[str, str]:
    """Source of each Triton kernel by its name."""
    return dict(KERNEL.findall(code))


def only_copies(source: str) -> bool:
    """True where a kernel stores what it loads, at most rounded to another dtype."""
    values = VALUE.findall(source)
    return "tl.store(" in source and all(MOVED.match(value.strip()) for value in values)


def counted(code: str) -> dict:
    """Launches of Triton kernels, calls of other kernels by name, and copies by what makes them."""
    sources = kernels(code)
    text = "\n".join(line for line in KERNEL.sub("", code).splitlines() if not line.lstrip().startswith("#"))
    launches = LAUNCH.findall(text)
    calls = Counter(name or operation for name, operation in CALL.findall(text))
    calls = Counter({name.removesuffix(".default"): n for name, n in calls.items()})
    copies = Counter("triton" for name in launches if only_copies(sources.get(name, "")))
    for name, n in calls.items():
        if re.search(r"\b(clone|copy_|_to_copy|contiguous)$", name):
            copies[name] += n
    copies["addmm"] = sum(copies_addend(split_arguments(inside)) for inside in ADDMM.findall(text))
    return {"triton": len(launches), "extern": dict(sorted(calls.items())), "copies": dict(+copies)}


def copies_addend(arguments: list[str]) -> bool:
    """True where a product is not added in place, so that the library first copies what it is added to.

    A bias, of stride 0, is read as it is.
    """
    addend = arguments[0]
    return "(0, 1)" not in addend and f"out={addend}" not in arguments


def split_arguments(inside: str) -> list[str]:
    """The arguments of a call from the text between its brackets."""
    arguments, depth = [""], 0
    for letter in inside:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            arguments.append("")
        else:
            arguments[-1] += letter
    return [argument.strip() for argument in arguments]


def added_up(counts: list[dict]) -> dict:
    """The same for several graphs together."""
    total = {"triton": sum(count["triton"] for count in counts)}
    for part in ("extern", "copies"):
        summed = sum((Counter(count[part]) for count in counts), Counter())
        total[part] = dict(sorted(summed.items()))
    return total
