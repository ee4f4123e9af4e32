"""The table of what was found, and whether it is worse than what was found before."""

COUNTS = (
    "graphs",
    "graphs after two rows",
    "uncompiled rows",
    "forward kernels",
    "forward copies",
    "backward kernels",
    "backward copies",
    "KB kept a token",
    "waits a step",
    "uploads a row",
    "kernels not built",
)
"""All are better when they are lower."""
TOLERANCE = 1.005  # of what is no whole number


def figures(found: dict) -> dict[str, float]:
    """The counts of one case, as far as it has them."""
    counts = {
        "graphs": found.get("graphs"),
        "graphs after two rows": found.get("graphs_after_two_rows"),
        "uncompiled rows": found.get("uncompiled_rows"),
        "KB kept a token": found.get("kept_kb"),
        "waits a step": found.get("waits"),
        "uploads a row": found.get("uploads_a_row"),
    }
    for direction in ("forward", "backward"):
        if work := found.get(direction):
            counts[f"{direction} kernels"] = sum(kernels_of(work))
            counts[f"{direction} copies"] = copies_of(work)
    if built := found.get("built"):
        counts["kernels not built"] = sum(len(of_one["failed"]) for of_one in built.values())
    return {name: counts[name] for name in COUNTS if counts.get(name) is not None}


def kernels_of(work: dict) -> tuple[int, int, int]:
    """Triton kernels, calls of other kernels by a graph, and operations outside of graphs."""
    return work["triton"], sum(work["extern"].values()), sum(work["eager"].values())


def copies_of(work: dict) -> int:
    """Operations that only copy, inside and outside of graphs."""
    return sum(work["copies"].values()) + work["eager_copies"]


def worse(before: dict[str, dict], now: dict[str, dict]) -> list[str]:
    """List what got worse in the cases that both have: a count that rose, or one that is no longer to be had."""
    lines = []
    for case in [name for name in now if name in before]:
        old, new = figures(before[case]), figures(now[case])
        for name, value in old.items():
            if name == "kernels not built" and name not in new:
                continue  # only built on request
            if name not in new:
                lines.append(f"{case}: {name} was {shown(value)}, now there is none")
            elif new[name] > value * TOLERANCE:
                lines.append(f"{case}: {name} rose from {shown(value)} to {shown(new[name])}")
    return lines


def table(cases: dict[str, dict]) -> str:
    """Markdown, one row for each case; what failed stands in the last column."""
    header = ["case", "graphs", "after row 2", "forward", "backward", "KB a token", "waits", "uploads"]
    lines = [[*header, "built", "remarks"], ["---"] + ["---:"] * 8 + ["---"]]
    for name, found in cases.items():
        counts = figures(found)
        cells = [shown(counts.get("graphs")), shown(counts.get("graphs after two rows"))]
        cells += [shown_work(found.get(direction)) for direction in ("forward", "backward")]
        cells += [shown(counts.get(key)) for key in ("KB kept a token", "waits a step", "uploads a row")]
        lines.append([name, *cells, shown_built(found.get("built")), remarks(found)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def shown(value: float | None) -> str:
    """A number for people: at most one digit after the point, none of a whole number."""
    if value is None:
        return ""
    return f"{value:.1f}".removesuffix(".0")


def shown_work(work: dict | None) -> str:
    """Triton + library + eager kernels, and in brackets how many of them only copy."""
    if work is None:
        return ""
    return " + ".join(map(str, kernels_of(work))) + f" ({copies_of(work)})"


def shown_built(built: dict | None) -> str:
    """Kernels built for each architecture, of those that there are."""
    if not built:
        return ""
    return ", ".join(
        f"sm_{architecture} {of_one['built']}/{of_one['built'] + len(of_one['failed'])}"
        for architecture, of_one in built.items()
    )


def remarks(found: dict) -> str:
    """Why there is nothing, or less."""
    parts = [found.get("failed")]
    if n_rows := found.get("uncompiled_rows"):
        parts.append(f"{n_rows} rows ran uncompiled, past Dynamo's limit" + "; KB are theirs" * ("kept_kb" in found))
    for part in ("eager", "compiled"):
        if why := found.get(f"{part}_failed"):
            parts.append(f"{part}: {why}")
    return "; ".join(filter(None, parts)).replace("|", "/")
