"""A plot of benchmarks/train.py's figures, or of its --growth's.

python benchmarks/plots.py FIGURES.json PLOT.svg
"""

import json
import sys
from pathlib import Path

import matplotlib
from tables import NAMES

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "lit_sft"  # the same figures make the same file
import matplotlib.pyplot as plt  # noqa: E402 (after the backend is chosen)

COLORS = dict(zip(NAMES, ("#1b6ca8", "#c1554d", "#8a8a8a", "#6f6f6f", "#b0b0b0"), strict=True))


def plot_training(result: dict, path: Path) -> None:
    """Useful tokens a second above, memory below; a column of panels for each shape."""
    shapes = list(result["shapes"])
    figure, axes = plt.subplots(2, len(shapes), figsize=(4.2 * len(shapes), 6), squeeze=False)
    for column, shape in enumerate(shapes):
        entries = sorted(result["shapes"][shape]["best"], key=lambda e: (e["precision"], -e["tokens_per_s"]))
        labels = [f"{NAMES[e['tool']]}\n{e['precision']}" for e in entries]
        colors = [COLORS[e["tool"]] for e in entries]
        for row, name in enumerate(("tokens_per_s", "above_weights_mb")):
            axes[row][column].barh(labels, [e[name] for e in entries], color=colors)
            axes[row][column].invert_yaxis()
            axes[row][column].tick_params(labelsize=7)
        axes[0][column].set_title(f"{shape}: useful tokens/s", fontsize=9)
        axes[1][column].set_title("peak MB above the weights", fontsize=9)
    save(figure, path)


def plot_growth(result: dict, path: Path) -> None:
    """Useful tokens a second over the length and over the number of examples; memory over the number."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
    for axis, name, x, y in (
        (axes[0], "lengths", "tokens_an_example", "tokens_per_s"),
        (axes[1], "counts", "examples", "tokens_per_s"),
        (axes[2], "counts", "examples", "above_weights_mb"),
    ):
        axis.plot([row[x] for row in result[name]], [row[y] for row in result[name]], "o-", color="#1b6ca8")
        axis.set_xscale("log")
        axis.set_ylim(bottom=0)
        axis.set_xlabel(x.replace("_", " "))
        axis.set_title({"tokens_per_s": "useful tokens/s"}.get(y, "peak MB above the weights"), fontsize=9)
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    """As SVG, without the date."""
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    figures = json.loads(Path(sys.argv[1]).read_text())
    (plot_training if "shapes" in figures else plot_growth)(figures, Path(sys.argv[2]))
