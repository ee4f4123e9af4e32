"""The page about a run, against plain counts of its metrics.jsonl."""

import json
import re
from pathlib import Path
from statistics import fmean, median

import pytest
from test_report import Page

from lit_sft.run_report import N_POINTS, write_run_report


def record(step: int, loss: float | None, **more: object) -> dict:
    """One line of metrics.jsonl."""
    return {
        "step": step, "epoch": 1, "loss": loss, "lr": 1e-3 * step, "grad_norm": 0.5, "n_labels": 30, "n_tokens": 40,
        "tokens_per_s": 100.0 + step, "padding_share": 0.0, "peak_mem_bytes": 2**30 + step, "seconds": 61.0, **more,
    }  # fmt: skip


def page_of(folder: Path, records: list[dict], max_steps: int | None = None, **arguments: object) -> tuple[str, Page]:
    """The page's text, and what is in it."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    named = {"checkpoint_dir": "base", "data_dir": "data/mine", **arguments}
    write_run_report(folder, named, max_steps or records[-1]["step"])
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def glance(text: str) -> list[str]:
    return re.findall(r"<dd>(.*?)</dd>", text)


def curves(text: str) -> list[list[tuple[float, float]]]:
    found = re.findall(r'<polyline class="\w+" points="(.*?) ?"/>', text)
    return [[tuple(map(float, pair.split(","))) for pair in points.split()] for points in found]


def test_the_numbers_are_those_of_the_records(tmp_path: Path) -> None:
    losses = [5.0, 4.0, 4.5, 3.0, 3.5]
    records = [record(k, loss) for k, loss in enumerate(losses, 1)]
    records[1]["val_loss"], records[4]["val_loss"] = 3.25, 3.75
    text, page = page_of(tmp_path / "run", records)
    assert glance(text) == ["4.0000", "3.2500", "200", "75.0 %", "103", "0:05:05", "1.00"]
    rows = page.tables["validations"][1:]
    assert rows == [["2", "1", "4.5000", "3.2500"], ["5", "1", f"{fmean(losses[2:]):.4f}", "3.7500"]]
    assert "The val loss was lowest after step 2, and 3.7500 in the end." in text and "not finished" not in text
    loss, val, rate, norm, speed = curves(text)
    assert loss == [(0, 0), (25, 50), (50, 25), (75, 100), (100, 75)]  # down is down
    assert val == [(25, 87.5), (100, 62.5)] and rate[0] == (0, 100) and rate[-1] == (100, 0)
    assert {y for _, y in norm} == {0} and len(speed) == 5


def test_spikes_and_skipped_steps_are_marked(tmp_path: Path) -> None:
    records = [record(k, 2.0) for k in range(1, 12)]
    records[4] |= {"loss": 6.0, "spike": True, "grad_norm": 44.0}
    records[7] |= {"loss": None, "grad_norm": None, "skipped": True}
    text, page = page_of(tmp_path / "run", records, max_steps=20)
    assert "1 step has a spike of the loss" in text and "1 step was skipped" in text and ": 8.</li>" in text
    assert page.tables["spikes"][1:] == [["5", "6.0000", "44"]]
    assert re.findall(r'dot spike" style="left: (.*?)%; top: (.*?)%" title="(.*?)"', text) == [
        ("40.0", "0.0", "step 5: 6.0000")
    ]
    assert "11 steps of 20" in text and "The run is not finished" in text


def test_a_long_run_is_averaged_and_a_spike_stays(tmp_path: Path) -> None:
    records = [record(k, 3.0 + (k % 2)) for k in range(1, 10_001)]
    records[5000] |= {"loss": 50.0, "spike": True}
    text, _ = page_of(tmp_path / "run", records)
    loss, *_ = curves(text)
    assert len(loss) <= N_POINTS and 'title="step 5001: 50.0000"' in text and len(text) < 100_000
    low, high = 3.5, 50.0
    values = [high - y / 100 * (high - low) for _, y in loss]
    assert median(values) == pytest.approx(3.5, abs=0.05)


@pytest.mark.parametrize("losses", [[1.5], [None], [2.0, 2.0]])
def test_few_steps(losses: list[float | None], tmp_path: Path) -> None:
    _, page = page_of(tmp_path / "run", [record(k, loss) for k, loss in enumerate(losses, 1)])
    assert page.tags["svg"] == (3 if losses == [None] else 4) and "validations" not in page.tables


def test_without_a_step_there_is_no_page(tmp_path: Path) -> None:
    write_run_report(tmp_path, {}, 10)
    (tmp_path / "metrics.jsonl").touch()
    write_run_report(tmp_path, {}, 10)
    assert not (tmp_path / "report.html").exists()


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    hostile = '"><script>alert(1)</script>'
    text, page = page_of(tmp_path / "a<b>run", [record(1, 2.0, val_loss=2.0)], data_dir=hostile, sample_prompt=hostile)
    assert "script" not in page.tags and "b" not in page.tags and "http:" not in text and "url(" not in text
    assert ["sample_prompt", hostile] in page.tables["arguments"]
    assert page.tags["caption"] == page.tags["table"] == len(page.tables) and page.tags["h1"] == 1
    assert ("svg", "role", "img") in page.attributes
