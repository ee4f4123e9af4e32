# ruff: noqa: F811 (a fixture of another file is an argument of tests)
"""Runs made from runs: by the arguments of another, for more steps, from an adapter that is there."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from safetensors.torch import load_file
from test_loop import data, lora_args, read_metrics  # noqa: F401 (data is a fixture)

from finetune import lora
from lit_sft.batches import TrainSteps
from lit_sft.cli import run
from lit_sft.errors import InputError
from lit_sft.optim import lr_schedule
from lit_sft.prepare import prepare
from lit_sft.prepare_args import PrepareArgs
from lit_sft.run_inputs import recorded
from lit_sft.shards import Shards

ONE = {"epochs": 1, "micro_batch_tokens": 700, "eval_interval": 100}


@pytest.fixture
def typed(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """``typed(*flags)`` runs finetune/lora.py; gives what it printed, or its complaint where ``code`` is 2."""

    def call(*flags: object, code: int = 0) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run(lora.main, ["--device=cpu", *map(str, flags)], prog="lora.py")
        out, err = capsys.readouterr()
        assert end.value.code == code, err
        return err.splitlines()[-1] if code else out

    return call


# --- run.yaml as --config


def test_run_yaml_holds_what_was_given(data: tuple[Path, Path], tmp_path: Path) -> None:
    args = lora_args(data[1], tmp_path / "out", epochs=1, quantize="bnb.nf4")
    lora.main(args)
    kept = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    assert kept == {k: v for k, v in asdict(args).items() if k != "debug"}
    resolved = recorded(tmp_path / "out")
    assert resolved["max_steps"] == 6 and resolved["checkpoint_dir"] == str(data[0]) and resolved["quantize"] == "nf4"


def test_other_data_are_trained_for_the_epochs_that_were_asked(
    data: tuple[Path, Path],
    tmp_path: Path,
    typed: Callable[..., str],
) -> None:
    """Fewer examples: fewer steps an epoch, and a batch size of their own."""
    base, data_dir = data
    flags = PrepareArgs(checkpoint_dir=str(base), destination_path=str(tmp_path / "less"), val_split_fraction=0.7)
    less = prepare(flags, ROOT / "demo" / "instructions.csv", "csv")
    typed("--data_dir", data_dir, "--out_dir", tmp_path / "a", "--epochs", 2)
    config = ["--config", tmp_path / "a" / "run.yaml", "--data_dir", less]
    for name, more, epochs in (("b", [], 2), ("c", ["--epochs", 4], 4)):
        out = typed(*config, "--out_dir", tmp_path / name, *more)
        per_epoch = -(-len(Shards(less, "train")) // recorded(tmp_path / name)["global_batch_size"])
        assert f"{epochs} epochs, which --epochs {epochs} ends" in out
        assert len(read_metrics(tmp_path / name)) == epochs * per_epoch
    assert recorded(tmp_path / "b")["global_batch_size"] < recorded(tmp_path / "a")["global_batch_size"]


@pytest.mark.parametrize(
    ("kept", "flags", "limit"),
    [
        ({"max_steps": 2, "epochs": 3}, ["--epochs", 1], "--epochs 1"),
        ({"max_steps": 2, "epochs": 3}, ["--epochs=1"], "--epochs 1"),
        ({"max_steps": 2, "epochs": 1}, ["--max_steps", 9], "--max_steps 9"),
        ({"epochs": 1}, ["--max_iters", 150], "--max_iters 150"),
        ({"max_steps": 2, "epochs": 3}, ["--learning_rate", 1e-3], "--max_steps 2"),
    ],
)
def test_a_limit_on_the_command_line_holds_against_the_files(
    kept: dict,
    flags: list,
    limit: str,
    data: tuple[Path, Path],
    tmp_path: Path,
    typed: Callable[..., str],
) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data_dir": str(data[1]), "global_batch_size": 24, **kept}))
    out = typed("--config", tmp_path / "c.yaml", "--out_dir", tmp_path / "out", *flags)
    steps = {"--epochs 1": 6, "--max_steps 9": 9, "--max_iters 150": 7, "--max_steps 2": 2}[limit]
    assert f"which {limit} ends" in out and len(read_metrics(tmp_path / "out")) == steps


def test_an_unfinished_run_of_an_earlier_version_goes_on(data: tuple[Path, Path], tmp_path: Path) -> None:
    """Whose run.yaml held the resolved arguments."""
    out = tmp_path / "out"
    lora.main(lora_args(data[1], tmp_path / "whole", **ONE))
    lora.main(lora_args(data[1], out, **ONE, max_time=1e-9))
    inputs = json.loads((out / "inputs.json").read_text())
    arguments = inputs.pop("arguments")
    (out / "inputs.json").write_text(json.dumps(inputs))
    (out / "run.yaml").write_text(
        yaml.safe_dump({k: v for k, v in arguments.items() if k not in ("extend", "init_from")})
    )
    lora.main(lora_args(data[1], out, **ONE))
    assert same(tmp_path / "whole", out) and (out / "DONE").is_file()


def same(one: Path, other: Path) -> bool:
    pair = [load_file(path / "adapter" / "adapter.safetensors") for path in (one, other)]
    return all(torch.equal(pair[0][name], pair[1][name]) for name in pair[0])


def test_flags_win_wherever_they_stand(data: tuple[Path, Path], tmp_path: Path, typed: Callable[..., str]) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data_dir": str(data[1]), "epochs": 2, "max_steps": 3}))
    out = typed("--epochs", 1, "--out_dir", tmp_path / "a", "--config", tmp_path / "c.yaml", "--learning_rate", 1e-3)
    assert "which --epochs 1 ends; learning rate 0.001" in out and (tmp_path / "a" / "DONE").is_file()
    out = typed(f"--config={tmp_path / 'c.yaml'}", "--out_dir", tmp_path / "b", "--max_steps", "null")
    assert "2 epochs, which --epochs 2 ends" in out


# --- --extend


def test_an_extended_run_follows_the_longer_schedule_from_where_it_was(
    data: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    out = tmp_path / "out"
    lora.main(lora_args(data[1], out, **ONE))
    before = read_metrics(out)
    with pytest.raises(InputError, match=r"holds a finished run; --extend true with a larger --epochs or --max_steps"):
        lora.main(lora_args(data[1], out, **(ONE | {"epochs": 2})))
    with pytest.raises(InputError, match=r"--extend true: .* has made its 6 steps, --epochs 1 asks for no more"):
        lora.main(lora_args(data[1], out, **ONE, extend=True))
    capsys.readouterr()
    longer = lora_args(data[1], out, **(ONE | {"epochs": 2}), extend=True)
    lora.main(longer)
    assert "extended from 6 to 12 steps; the learning rate follows the schedule of 12 steps" in capsys.readouterr().out
    after = read_metrics(out)
    assert after[:6] == before and [r["step"] for r in after] == list(range(1, 13))
    lr_at = lr_schedule(longer, 12)
    assert [r["lr"] for r in after[6:]] == [lr_at(step) for step in range(7, 13)]
    assert [r["loss"] for r in after[6:]] != [r["loss"] for r in before]
    assert (out / "DONE").read_text() == "12 steps\n"
    assert yaml.safe_load((out / "run.yaml").read_text())["extend"] is False
    examples = TrainSteps(Shards(data[1], "train"), longer).examples
    assert sorted(i for k in range(7, 13) for i in examples(k)) == list(range(len(Shards(data[1], "train"))))


def test_an_interrupted_extension_goes_on_to_the_same_bits(data: tuple[Path, Path], tmp_path: Path) -> None:
    for name, pauses in (("whole", 0), ("paused", 2)):
        out = tmp_path / name
        lora.main(lora_args(data[1], out, **ONE))
        for _ in range(pauses):
            lora.main(lora_args(data[1], out, **(ONE | {"epochs": 2}), extend=True, max_time=1e-9))
            assert not (out / "DONE").exists()
        lora.main(lora_args(data[1], out, **(ONE | {"epochs": 2}), extend=bool(pauses != 1)))
        assert (out / "DONE").read_text() == "12 steps\n"
    assert same(tmp_path / "whole", tmp_path / "paused")


def test_a_finished_run_without_a_state_is_not_extended_over_its_result(
    data: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    lora.main(lora_args(data[1], out, **ONE))
    shutil.rmtree(out / "checkpoints")
    before = (out / "adapter" / "adapter.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"without a saved state to go on from; .* --init_from"):
        lora.main(lora_args(data[1], out, **(ONE | {"epochs": 2}), extend=True))
    assert (out / "adapter" / "adapter.safetensors").read_bytes() == before and (out / "DONE").is_file()


def test_an_unfinished_run_is_extended_only_when_asked(data: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    lora.main(lora_args(data[1], out, **ONE, max_time=1e-9))
    longer = ONE | {"epochs": 2}
    refusal = r"\(max_steps: 6 then, 12 now by --epochs 2\); --extend true gives it more steps; else"
    with pytest.raises(InputError, match=refusal):
        lora.main(lora_args(data[1], out, **longer))
    with pytest.raises(InputError, match=r"computes something else \(learning_rate: "):
        lora.main(lora_args(data[1], out, **longer, extend=True, learning_rate=1e-3))
    lora.main(lora_args(data[1], out, **longer, extend=True))
    assert len(read_metrics(out)) == 12
    with pytest.raises(InputError, match=r"--extend true: .* holds no run to extend"):
        lora.main(lora_args(data[1], tmp_path / "absent", **ONE, extend=True))
    assert not (tmp_path / "absent").exists()


# --- --init_from


def test_a_run_from_an_adapter_starts_with_its_matrices(data: tuple[Path, Path], tmp_path: Path) -> None:
    """Its first loss is that of the adapter; the optimizer begins anew."""
    lora.main(lora_args(data[1], tmp_path / "first", **(ONE | {"epochs": 3})))
    for source in ("first", "first/adapter", "first/checkpoints/step-00000018"):
        out = tmp_path / source.replace("/", "_")
        out = out.with_name(f"from_{out.name}")
        lora.main(lora_args(data[1], out, **ONE, init_from=str(tmp_path / source), learning_rate=1e-12))
        assert read_metrics(out)[0]["loss"] < read_metrics(tmp_path / "first")[0]["loss"] - 0.2
        before, after = (load_file(d / "adapter" / "adapter.safetensors") for d in (tmp_path / "first", out))
        assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    shutil.rmtree(tmp_path / "first")  # a run that has begun needs it no more
    out = tmp_path / "from_first"
    (out / "DONE").unlink()
    lora.main(lora_args(data[1], out, **ONE, init_from=str(tmp_path / "first"), learning_rate=1e-12))


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"lora_r": 8}, "has lora_r 16, this run 8; add --lora_r 16"),
        ({"lora_alpha": 16}, "has lora_alpha 32, this run 16; add --lora_alpha 32"),
        ({"lora_mlp": False}, "has lora_mlp True, this run False; add --lora_mlp true"),
        ({"init_from": "absent"}, "absent"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_before_the_first_step(
    changes: dict,
    refusal: str,
    data: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    lora.main(lora_args(data[1], tmp_path / "first", **ONE, max_steps=1))
    with pytest.raises(InputError, match=re.escape(refusal)):
        lora.main(lora_args(data[1], tmp_path / "out", **(ONE | {"init_from": str(tmp_path / "first")} | changes)))
    assert not (tmp_path / "out").exists()
