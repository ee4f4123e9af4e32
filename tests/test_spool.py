"""Encoding in chunks, by several processes, killed at any instant: always the same bytes; and mixing, from files."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT, make_hf_llama

import lit_sft.spool
from lit_sft import cli, errors
from lit_sft.args import ConvertArgs
from lit_sft.convert import convert_checkpoint
from lit_sft.errors import InputError, Interrupted
from lit_sft.hub_datasets import HubDataset
from lit_sft.mixing import read_mix, read_scores, with_flags
from lit_sft.prepare import prepare, prepare_mix
from lit_sft.prepare_args import PrepareArgs
from lit_sft.rows import Columns
from lit_sft.shards import Shards
from lit_sft.sources import Reshaped, SampleStream

HOME = "checkpoints/test/tiny"


@pytest.fixture(scope="module")
def converted(tmp_path_factory, tokenizer_model) -> Path:
    root = tmp_path_factory.mktemp("spool")
    make_hf_llama(root / HOME, tokenizer_model)
    convert_checkpoint(ConvertArgs(checkpoint_dir=str(root / HOME)))
    return root


@pytest.fixture
def home(tmp_path, monkeypatch, converted) -> Path:
    (tmp_path / "checkpoints").symlink_to(converted / "checkpoints")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(path: Path, n: int, text: str = "a few words of an answer, not always the same") -> Path:
    with path.open("w", newline="") as file:
        rows = ((f"Question {path.stem} {i}?", f"{i % 7} {text} {i * i}") for i in range(n))
        csv.writer(file).writerows([("instruction", "output"), *rows])
    return path


def write_mix(path: Path, *entries: dict) -> Path:
    path.write_text(json.dumps(entries))  # JSON is YAML
    return path


def run(path: Path, destination: str = "data/d", **flags: object) -> Path:
    args = PrepareArgs(destination_path=destination, **flags)
    return prepare(args, path, "d", Columns())


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.pt")}


def names(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "data").iterdir())


def questions(folder: Path, split: str = "train") -> list[tuple[int, int]]:
    shards = Shards(folder, split)
    return [(int(shards.fact("source", i)), int(shards.fact("row", i))) for i in range(len(shards))]


def facts(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())["facts"]


# --- the same bytes


def test_any_number_of_workers_and_any_chunks_give_the_same_bytes(home, monkeypatch):
    path, found = write_rows(home / "d.csv", 95), []
    for chunk, workers in ((1000, 1), (10, 1), (10, 2), (7, 3)):
        monkeypatch.setattr(lit_sft.spool, "CHUNK", chunk)
        found.append(shard_bytes(run(path, num_workers=workers, deduplicate="near", max_repetition_share=0.9)))
    assert found[0].keys() == {"train-00000.pt", "val-00000.pt"} and all(other == found[0] for other in found)
    assert names(home) == ["d"]


class Stopped(lit_sft.spool.Workers):
    """Ctrl-C as the seventh chunk is handed out."""

    def submit(self, *arguments: object) -> None:
        super().submit(*arguments)
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 5:
            self._wait_for(0)
            raise KeyboardInterrupt


def test_an_interrupted_preparation_goes_on(home, monkeypatch, capsys):
    path = write_rows(home / "d.csv", 95)
    monkeypatch.setattr(lit_sft.spool, "CHUNK", 10)
    whole = shard_bytes(run(path, "whole"))
    monkeypatch.setattr(lit_sft.spool, "Workers", Stopped)
    with pytest.raises(Interrupted, match=r"kept in .*/data/\.partial-d: the same command goes on from there") as end:
        run(path, num_workers=2)
    assert end.value.exit_code == 130 and names(home) == [".partial-d"]
    monkeypatch.undo()
    monkeypatch.chdir(home)
    monkeypatch.setattr(lit_sft.spool, "CHUNK", 10)
    capsys.readouterr()
    assert shard_bytes(run(path, num_workers=1)) == whole and names(home) == ["d"]
    assert "7 of 10 chunks of 10 rows were there from an interrupted run" in capsys.readouterr().out


def test_a_signal_that_a_library_swallows_is_answered_too(home, monkeypatch, capsys):
    """tqdm drops what is raised while it starts a thread, also the exception of a signal's handler."""

    class Swallowing(lit_sft.spool.tqdm):
        def __init__(self, *arguments: object, **named: object) -> None:
            super().__init__(*arguments, **named)
            with suppress(Exception):
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(lit_sft.spool, "tqdm", Swallowing)
    path = write_rows(home / "d.csv", 20)
    try:
        with pytest.raises(SystemExit) as end:
            cli.run(import_module(cli.commands()["prepare_csv"]).main, ["--csv_path", str(path)])
    finally:
        errors.stops.clear()
    assert end.value.code == 143 and not (home / "data").exists()
    assert capsys.readouterr().err.endswith("error: stopped by a signal; nothing is left half written\n")


@pytest.mark.parametrize("change", ["data", "style", "limit"])
def test_what_is_there_is_used_for_the_same_rows_and_rules_only(home, monkeypatch, capsys, change):
    path = write_rows(home / "d.csv", 95)
    monkeypatch.setattr(lit_sft.spool, "CHUNK", 10)
    with monkeypatch.context() as patched:
        patched.setattr(lit_sft.spool, "Workers", Stopped)
        with pytest.raises(Interrupted):
            run(path, num_workers=2)
    capsys.readouterr()
    flags = {"style": {"prompt_style": "plain"}, "limit": {"max_seq_length": 200}}.get(change, {})
    if change == "data":
        path.write_text(path.read_text().replace("Question d 25?", "Another?"))
    found = shard_bytes(run(path, num_workers=1, **flags))
    said = capsys.readouterr().out
    assert ("6 of 10 chunks" in said) if change == "data" else ("were there" not in said)
    assert found == shard_bytes(run(path, "anew", num_workers=1, **flags))


def test_a_killed_command_goes_on_to_the_same_bytes(home):
    """kill -9, again and again, whenever a few more chunks are there; no worker outlives it."""
    path = write_rows(home / "big.csv", 12_000)
    command = [sys.executable, str(ROOT / "scripts/prepare_csv.py"), "--csv_path=big.csv", "--num_workers=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    work, done = home / "data/.partial-csv", 2
    for _ in range(3):
        running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(list(work.glob("*.npy"))) < done and time.monotonic() < deadline:
            time.sleep(0.005)
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        running.kill()
        running.communicate()
        done = len(list(work.glob("*.npy"))) + 2
        assert not (home / "data/csv").exists() and done > 3
        while any(_is_running(child) for child in children):
            assert time.monotonic() < deadline, "a worker outlived its parent"
            time.sleep(0.05)
    last = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    assert "of 12 chunks of 1000 rows were there from an interrupted run" in last.stdout
    assert shard_bytes(home / "data/csv") == shard_bytes(run(path, "whole", num_workers=1))
    assert names(home) == ["csv"]


def _is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_worker_that_dies_is_said_and_what_is_done_is_kept(home):
    write_rows(home / "big.csv", 30_000)
    command = [sys.executable, str(ROOT / "scripts/prepare_csv.py"), "--csv_path=big.csv", "--num_workers=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list((home / "data/.partial-csv").glob("*.npy"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    worker = next(c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes())
    os.kill(int(worker), signal.SIGKILL)
    complaint = running.communicate(timeout=60)[1].splitlines()[-1]
    assert running.returncode == 1 and complaint.startswith("error: a worker process died"), complaint
    assert "the same command goes on from there" in complaint
    assert len(list((home / "data/.partial-csv").glob("*.npy"))) >= 4 and not (home / "data/csv").exists()


MEASURE = """
if __name__ == "__main__":
    import re, sys
    import lit_sft.shards, lit_sft.spool
    from multiprocessing import active_children
    from pathlib import Path
    from lit_sft.prepare_args import PrepareArgs
    from lit_sft.prepare import prepare
    from lit_sft.rows import Columns

    def peak(process):
        return int(re.search(r"VmHWM:\\s+(\\d+)", Path(f"/proc/{process}/status").read_text())[1]) / 1024

    class Watched(lit_sft.spool.Workers):
        def __exit__(self, *arguments):
            self._wait_for(0)
            self.peaks.append(max(peak(child.pid) for child in active_children()))
            super().__exit__(*arguments)

    Watched.peaks = []
    lit_sft.spool.Workers, lit_sft.spool.CHUNK, lit_sft.shards.SHARD_TOKENS = Watched, 100, 1 << 16
    prepare(PrepareArgs(num_workers=2), Path(sys.argv[1]), Path(sys.argv[1]).stem, Columns())
    print(peak("self"), *Watched.peaks)
"""


def test_memory_does_not_grow_with_the_input(home):
    """32 MB more of text; hardly more memory: 60 bytes for what is known of each of 16,000 examples."""
    peaks = []
    for name, n in (("small", 2_000), ("big", 18_000)):
        write_rows(home / f"{name}.csv", n, "a few words, " * 150)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", MEASURE, f"{name}.csv"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(list(map(float, done.stdout.split()[-2:])))
    assert (home / "big.csv").stat().st_size - (home / "small.csv").stat().st_size > 30e6
    (parent, worker), (parent_of_big, worker_of_big) = peaks
    assert parent_of_big - parent < 10 and worker_of_big - worker < 10, peaks
    assert worker < parent / 2  # without torch


# --- problems


def test_ten_problems_are_told_and_the_rest_counted(home, capsys):
    path = home / "d.jsonl"
    rows = [{"instruction": f"Q{i}", "output": "" if i % 2 else "A", "n": i} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError) as caught:
        run(path)
    assert "d.jsonl row 6: column 'output' is empty (line 6); and 17 more; columns: " in str(caught.value)
    assert caught.value.details[9:] == ["d.jsonl row 20: column 'output' is empty (line 20)", "… and 10 more"]
    assert not (home / "data").exists()
    capsys.readouterr()
    folder = run(path, on_error="skip")
    assert capsys.readouterr().out.count("skipped: ") == 10
    skipped = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert [problem["cells"] for problem in skipped] == rows[1::2]
    assert skipped[3]["place"] == "d.jsonl row 8" and "is empty" in skipped[3]["why"]
    found = facts(folder)
    assert (found["n_rows"], found["n_skipped"], found["n_train"] + found["n_val"]) == (40, 20, 20)
    run(path, on_error="skip")  # the file is known as ours


def test_nothing_is_encoded_once_a_row_is_malformed_but_all_is_read(home, monkeypatch):
    path = write_rows(home / "d.csv", 50)
    path.write_text(path.read_text().replace("Question d 12?", "").replace("Question d 45?", ""))
    monkeypatch.setattr(lit_sft.spool, "CHUNK", 10)
    written, write_chunk = [], lit_sft.spool.write_chunk
    monkeypatch.setattr(lit_sft.spool, "write_chunk", lambda *a: (written.append(a), write_chunk(*a)))
    with pytest.raises(InputError, match=r"d.csv row 13: .*d.csv row 46: "):
        run(path, num_workers=1)
    assert len(written) == 1 and not (home / "data").exists()


# --- mixing


def test_a_mix(home, capsys):
    write_rows(home / "a.csv", 40)
    (home / "b.jsonl").write_text("\n".join(json.dumps({"q": f"b {i}", "a": f"answer {i}"}) for i in range(60)))
    (home / "good.txt").write_text("\n".join(str(i % 5) for i in range(40)))
    b = {"data_file": "b.jsonl", "instruction_column": "q", "output_column": "a", "val_split_fraction": 0, "weight": 2}
    a = {"data_file": "a.csv", "weight": 1, "keep_scores": "good.txt", "min_score": 4, "repeat": 2}
    args = PrepareArgs(destination_path="data/mix", order="source", val_split_fraction=0.25)
    folder = prepare_mix(args, read_mix(write_mix(home / "mix.yaml", a, b), args), "mix")
    told = capsys.readouterr().out
    rows = questions(folder)
    # 8 of a are rated 4, two of them are held out, the others are there twice; b gives twice as many as a's 12
    assert [source for source, _ in rows] == [0] * 12 + [1] * 24
    assert {row for source, row in rows if source == 0} | {row for _, row in questions(folder, "val")} == set(
        range(5, 41, 5)
    )
    found = facts(folder)
    by_name = {source["name"]: source for source in found["sources"]}
    assert (by_name["a.csv"]["n_low_score"], by_name["a.csv"]["n_val"], by_name["a.csv"]["n_rows"]) == (32, 2, 40)
    assert (by_name["b.jsonl"]["n_not_drawn"], by_name["b.jsonl"]["n_train"]) == (36, 24)
    assert found["n_train"] == 36 and found["n_tokens"] == sum(s["n_tokens"] for s in found["sources"])
    assert "reading b.jsonl: " in told and ": instruction from 'q', output from 'a'" in told
    assert "a.csv: 40 rows → 12 train, 2 val" in told and "32 rated too low, 36 not drawn" in told


MIXES = {
    "no list": ("data_file: a.csv", "must be a list of sources"),
    "no YAML": ("- [", "is not YAML"),
    "empty": ("", "must be a list of sources"),
    "a name": ("- a.csv", "must be a list of sources"),
    "unknown key": ("- {data_file: a.csv, wieght: 1}", "mix.yaml source 1: unknown key 'wieght'; known: 'data_file'"),
    "no source": ("- weight: 1", "source 1: give one of data_file and data_repo_id"),
    "two sources": ("- {data_file: a, data_repo_id: b/c}", "source 1: give one of data_file and data_repo_id"),
    "half weights": ("- {data_file: a.csv, weight: 1}\n- {data_file: a.csv}", "give every source a weight, or none"),
    "no number": ("- {data_file: a.csv, weight: much}", "weight 'much' is no float"),
    "zero": ("- {data_file: a.csv, weight: 0, repeat: 0}", "weight 0 must be above 0; repeat 0 must be above 0"),
    "boolean": ("- {data_file: a.csv, repeat: true}", "repeat True is no int"),
    "split": ("- {data_file: a.csv, val_split_fraction: 1.0}", "val_split_fraction 1.0 must be in [0, 1)"),
    "aliases": ("- data_file: [&a [x, x], &b [*a, *a]]", "is not YAML: it has the alias *a"),
    "an empty number": ('- {data_file: a.csv, repeat: !!int ""}', "is not YAML: it holds a value that is none of its"),
    "a time that is none": ("- data_file: !!timestamp x", "is not YAML: it holds a value that is none of its kind"),
    "a truth that is none": ("- data_file: !!bool x", "is not YAML: it holds a value that is none of its kind"),
    "deep": ("- " + "[" * 3000, "is not YAML"),
    "deep, whole": ("- " + "[" * 300 + "]" * 300, "is nested deeper than 50 levels"),
    "a long number": ("- {data_file: a.csv, repeat: 1" + ":20" * 99_999 + "}", "it has a number of 299,998 characters"),
    "a huge number": ("- {data_file: a.csv, repeat: 1" + "0" * 90 + "}", "0000 is no int"),
    "a long list": ("- {data_file: [" + "x, " * 900 + "]}", "'x', is no str"),
    "scores": ("- {data_file: a.csv, keep_scores: s.txt}", "give keep_scores and min_score together"),
    "absent scores": ("- {data_file: a.csv, keep_scores: s.txt, min_score: 1}", "--keep_scores s.txt does not exist"),
}


@pytest.mark.parametrize("case", MIXES)
def test_wrong_mixes(home, case):
    (home / "mix.yaml").write_text(MIXES[case][0])
    with pytest.raises(InputError) as caught:
        read_mix(Path("mix.yaml"), PrepareArgs())
    assert MIXES[case][1] in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_sources_of_one_name_are_told_apart(home):
    for folder in ("a", "b"):
        (home / folder).mkdir()
        write_rows(home / folder / "d.csv", 3)
    mix = write_mix(home / "mix.yaml", {"data_file": "a/d.csv"}, {"data_file": "b/d.csv", "max_examples": 1})
    found = read_mix(mix, PrepareArgs())
    assert [source.stream.name for source in found] == ["a/d.csv", "b/d.csv"]
    folder = prepare_mix(PrepareArgs(deduplicate="exact", val_split_fraction=0.0), found[:1] * 2, "twice")
    assert facts(folder)["n_duplicates"] == 3 and facts(folder)["n_train"] + facts(folder)["n_val"] == 3


def test_a_token_is_no_part_of_a_name(home):
    """Two configurations of a Hub dataset have one name, and are told apart without what gives access to them."""
    entries = [{"data_repo_id": "me/talks", "data_config": config} for config in ("en", "de")]
    found = read_mix(write_mix(home / "mix.yaml", *entries), PrepareArgs(access_token="hf_secret"))
    assert [source.stream.name for source in found] == ["me/talks en train", "me/talks de train"]
    assert "hf_secret" not in repr(found[0].stream.source)


def test_a_val_file_of_the_same_name_is_told_apart():
    files = [Path("a/d.csv"), Path("b/d.csv"), HubDataset("me/d.csv")]
    for given in (files[:2], [Reshaped(file, iter) for file in files[:2]]):
        found = with_flags(PrepareArgs(), [SampleStream(source) for source in given])
        assert [source.stream.name for source in found] == ["a/d.csv", "b/d.csv"]
    found = with_flags(PrepareArgs(), [SampleStream(source) for source in files[1:]])
    assert [source.stream.name for source in found] == ["d.csv", "d.csv train"]


SCORES = {
    "lines": ("s.txt", "4.5\n3\n5\n", [4.5, 3, 5]),
    "json lines": ("s.jsonl", "4.5\n3\n5\n", [4.5, 3, 5]),
    "in order": ("s.csv", "score,why\n4.5,x\n3,y\n5,z\n", [4.5, 3, 5]),
    "by row": ("s.csv", "row,score\n3,5\n1,4.5\n2,3\n", [4.5, 3, 5]),
    "objects": ("s.jsonl", '{"row": 2, "score": 3}\n{"row": 1, "score": "4.5"}\n{"row": 3, "score": 5}', [4.5, 3, 5]),
    "no number": ("s.txt", "4\ngood\n", "--keep_scores s.txt row 2: 'good' for row 2 is no score of a row"),
    "nan": ("s.txt", "nan\n", "row 1: 'nan'"),
    "blank": ("s.txt", "4\n\n5", "row 2: '' for row 2 is no score"),
    "empty": ("s.txt", "", "holds no scores"),
    "no column": ("s.csv", "row,rating\n1,2\n", "there is no column 'score'; columns: 'row', 'rating'"),
    "twice": ("s.csv", "row,score\n1,2\n1,3\n", "row 2: row 1 has two scores"),
    "row 0": ("s.csv", "row,score\n0,2\n", "'2' for row '0' is no score of a row"),
    "far away": ("s.csv", "row,score\n400000000,1\n", "rates row 400000000, but no more than 1 in all"),
    "beyond": ("s.csv", "row,score\n9223372036854775808,1\n", "rates row 9223372036854775808, but no more than 1 in"),
    "an infinite row": ("s.jsonl", '{"row": Infinity, "score": 1}', "1 for row inf is no score of a row"),
    "a huge score": ("s.jsonl", '{"score": 1' + "0" * 400 + "}", "000 for row 1 is no score of a row"),
    "broken": ("s.jsonl", '{"score": 1}\n{"sc', "row 2: is not JSON"),
}


@pytest.mark.parametrize("case", SCORES)
def test_scores(home, case):
    name, content, expected = SCORES[case]
    (home / name).write_text(content)
    if isinstance(expected, list):
        assert read_scores(Path(name)).tolist() == expected
    else:
        with pytest.raises(InputError) as caught:
            read_scores(Path(name))
        assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_scores_of_a_single_source(home):
    write_rows(home / "d.csv", 10)
    (home / "s.txt").write_text("\n".join("25"[i % 2] for i in range(10)))
    folder = run(home / "d.csv", keep_scores="s.txt", min_score=3.0, val_split_fraction=0.0, order="as_given")
    assert [row for _, row in questions(folder)] == [2, 4, 6, 8, 10] and facts(folder)["n_low_score"] == 5
    (home / "s.txt").write_text("5\n" * 9)
    with pytest.raises(InputError, match=r"no score for row 10 of d.csv \(1 rows in all\)"):
        run(home / "d.csv", keep_scores="s.txt", min_score=3.0)
