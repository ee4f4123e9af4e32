"""``lit-sft verify`` finds what was changed in any directory that the toolkit wrote, and nothing in what was not."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_inputs import rehash
from faults import fork
from reliability import RUN, command, make_checkpoint, train, write_rows

from lit_sft.atomic import Manifest
from lit_sft.errors import InputError
from lit_sft.integrity import check_directory

SHORT = RUN | {"max_steps": 4, "eval_interval": 2, "save_interval": 2}
WROTE = ("base", "data", "lora", "full", "lora/adapter", "full/model", "lora/checkpoints/step-00000004", "merged")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each directory: a checkpoint, data, runs of both recipes, what was merged; and a download's record."""
    made = tmp_path_factory.mktemp("made")

    def make() -> None:
        os.chdir(made)
        make_checkpoint(Path("base"))
        write_rows(Path("rows.csv"), 20)
        command("prepare_csv", "--csv_path=rows.csv", "--checkpoint_dir=base", "--destination_path=data")
        for recipe in ("lora", "full"):
            train(Path(), recipe, Path(recipe), **SHORT)
        command("merge_lora", "--lora_path=lora", "--out_dir=merged")

    assert fork(make, made.with_suffix(".log")) == 0, made.with_suffix(".log").read_text()
    return made


@pytest.fixture
def world(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working directory."""
    shutil.copytree(made, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


def damaged(directory: str | Path) -> list[str]:
    """The findings that are problems."""
    return [str(finding) for finding in check_directory(Path(directory)) if finding.problem]


@pytest.mark.parametrize("directory", WROTE)
def test_what_is_whole_is_called_so(directory: str, world: Path, capsys: pytest.CaptureFixture) -> None:
    command("verify", directory)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 3 and all(line.startswith("ok       ") for line in lines)
    command("verify", "--path", directory)


def test_every_file_has_a_recorded_hash(world: Path) -> None:
    """Of what the toolkit wrote; convert adds to a folder of the Hub's, whose files download.json records."""
    for directory in ("data", "lora/adapter", "full/model", "lora/checkpoints/step-00000004", "merged"):
        there = {path.name for path in Path(directory).iterdir()} - {".lock", "manifest.json"}
        assert there == set(Manifest.read(Path(directory)).files)


@pytest.mark.parametrize("change", ["flip", "cut", "empty", "remove"])
@pytest.mark.parametrize("directory", WROTE)
def test_every_file_with_a_recorded_hash_is_guarded(directory: str, change: str, world: Path) -> None:
    names = Manifest.read(Path(directory)).files if (Path(directory) / "manifest.json").exists() else {}
    for folder in (Path("lora/adapter"), Path("full/checkpoints/step-00000002")) if not names else ():
        names |= (
            {str((folder / n).relative_to(directory)): f for n, f in Manifest.read(folder).files.items()}
            if (str(folder).startswith(directory))
            else {}
        )
    assert names
    for name in names:
        path = Path(directory) / name
        content = path.read_bytes()
        if change == "remove":
            path.unlink()
        else:
            middle = len(content) // 2
            flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            path.write_bytes({"flip": flipped, "cut": content[:-1], "empty": b""}[change])
        found = damaged(directory)
        assert any(name in line for line in found), (name, found)
        path.write_bytes(content)
    assert damaged(directory) == []


RUN_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a step is missing": (lambda run: _lines(run, lambda lines: [lines[0], *lines[2:]]), "line 2 is of step 3; step 2"),
    "a step is there twice": (lambda run: _lines(run, lambda lines: [*lines[:2], *lines[1:]]), "line 3 is of step 2"),
    "the first is missing": (lambda run: _lines(run, lambda lines: lines[1:]), "line 1 is of step 2; step 1"),
    "the last is missing": (lambda run: _lines(run, lambda lines: lines[:-1]), "state after step 4"),
    "no record": (lambda run: _lines(run, lambda lines: ["[]", *lines]), "line 1: it is no record"),
    "no records": (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl"),
    "the end is another": (lambda run: (run / "DONE").write_text("9 steps\n"), "DONE says '9 steps'"),
    "the end is no text": (lambda run: (run / "DONE").write_bytes(b"\xff"), "DONE says"),
    "the result is missing": (lambda run: shutil.rmtree(run / "adapter"), "the run is finished, but"),
    "the result is another's": (
        lambda run: _edited(run / "adapter", "adapter_config.json", lora_alpha=64.0),
        "it has lora_alpha 64.0, the run was started with",
    ),
    "the best is missing": (
        lambda run: _edited(run / "checkpoints/step-00000004", "state.json", best_step=1),
        "the state of the lowest val loss, step-00000001, is missing",
    ),
    "facts flipped": (lambda run: _newer(run / "adapter", facts={"n": 1}), "differs from its own digest"),
    "arguments cut": (lambda run: (run / "run.yaml").write_text("lora_r: [1"), "run.yaml: it is no YAML"),
    "arguments empty": (lambda run: (run / "run.yaml").write_text(""), "no run's arguments"),
    "inputs": (lambda run: (run / "inputs.json").write_text("{"), "inputs.json"),
    "another base": (
        lambda run: (run / "inputs.json").write_text('{"base_fingerprint": "0"}'),
        "not the one that the run was started on",
    ),
    "a state renamed": (
        lambda run: (run / "checkpoints/step-00000002").rename(run / "checkpoints/step-00000003"),
        "after step 2, which is not what its name says",
    ),
    "a state without manifest": (lambda run: (run / "checkpoints/step-00000002/manifest.json").unlink(), "is missing"),
    "a newer state": (lambda run: _newer(run / "checkpoints/step-00000004"), "format 2, newer than 1; update lit_sft"),
    "a newer adapter": (lambda run: _newer(run / "adapter"), "format 2, newer than 1; update lit_sft"),
}


def _lines(run: Path, change: Callable[[list[str]], list[str]]) -> None:
    path = run / "metrics.jsonl"
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))


def _newer(directory: Path, **changes: object) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (changes or {"format_version": 2})))


def _edited(directory: Path, name: str, **changes: object) -> None:
    """Fields of a JSON file changed, and its hash recorded anew."""
    (directory / name).write_text(json.dumps(json.loads((directory / name).read_text()) | changes))
    rehash(directory)


@pytest.mark.parametrize("what", RUN_DAMAGE)
def test_a_run_that_does_not_hang_together(what: str, world: Path) -> None:
    change, says = RUN_DAMAGE[what]
    change(Path("lora"))
    assert any(says in line for line in damaged("lora")), damaged("lora")


def test_a_line_that_a_kill_cut_is_no_damage(world: Path) -> None:
    (Path("lora") / "DONE").unlink()
    with (Path("lora") / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert damaged("lora") == []


def test_what_is_consistent_but_wrong_is_found(world: Path) -> None:
    """Hashes that fit prove nothing when the content does not: counts, shapes and the base are compared as well."""
    manifest = Manifest.read(Path("data"))
    manifest.facts["n_train"] += 1
    manifest.write(Path("data"), [])
    assert "its manifest says" in damaged("data")[0]

    config = json.loads(Path("base/model_config.json").read_text())
    Path("base/model_config.json").write_text(json.dumps(config | {"intermediate_size": 50}))
    Manifest("checkpoint", {}).write(Path("base"), Manifest.read(Path("base")).files)
    assert "mlp.down.weight has shape (32, 48), not (32, 50)" in damaged("base")[0]
    command("convert_hf_checkpoint", "--checkpoint_dir=base", "--dtype=bfloat16")
    assert damaged("base") == [] and "whose weights differ" in damaged("lora/adapter")[0]

    shutil.rmtree("base")
    assert damaged("lora/adapter") == [], "an adapter that was moved alone is whole"


def test_a_download_is_compared_with_what_the_hub_stated(world: Path) -> None:
    from hub_server import File

    names = ("config.json", "tokenizer.model", "model.safetensors")
    files = {name: File((Path("base") / name).read_bytes()) for name in names}
    hashes = {name: f.sha256 if name == "model.safetensors" else f.git_sha1 for name, f in files.items()}
    facts = {name: {"bytes": f.size, "hash": hashes[name]} for name, f in files.items()}
    Path("base/download.json").write_text(json.dumps({"repo_id": "a/b", "files": facts}))
    assert damaged("base") == []
    for name in names:
        content = (Path("base") / name).read_bytes()
        (Path("base") / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert any(name in line and "not the one that the Hub stated" in line for line in damaged("base"))
        (Path("base") / name).write_bytes(content)
    for record in ("[]", "{}", '{"files": {"x": 1}}', '{"files": {"../lora/DONE": {"bytes": 1, "hash": "0"}}}'):
        Path("base/download.json").write_text(record)
        assert len(damaged("base")) >= 1


def test_a_damaged_directory_ends_the_command_with_2(world: Path, capsys: pytest.CaptureFixture) -> None:
    (Path("data") / "train-00000.pt").write_bytes(b"")
    with pytest.raises(SystemExit) as end:
        command("verify", "data")
    out, err = capsys.readouterr()
    assert end.value.code == 2 and "DAMAGED  data/train-00000.pt" in out
    assert err.startswith("error: data: 1 of ") and err.count("\n") == 1 and "train-00000.pt" in err


@pytest.mark.parametrize("what", ["nowhere", "rows.csv", "."])
def test_what_is_no_directory_of_the_toolkit_is_refused(what: str, world: Path) -> None:
    with pytest.raises(InputError, match=r"no directory|nothing that lit_sft finished"):
        list(check_directory(Path(what)))
