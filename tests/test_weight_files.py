"""Which of a folder's weights are read: those that transformers reads, and what lies beside them is named."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_hf_llama
from safetensors.torch import load_file, save_file

from lit_sft import load_model
from lit_sft.args import ConvertArgs, DoctorArgs, ExportHFArgs
from lit_sft.convert import convert_checkpoint
from lit_sft.doctor import examine
from lit_sft.errors import InputError
from lit_sft.export import export_hf
from lit_sft.verify import convert_verified
from lit_sft.weight_files import missing_files

IDS = torch.randint(0, 400, (1, 20), generator=torch.Generator().manual_seed(1))
SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape with three sets of weights, each as one file: ``a``, ``b`` and ``c``."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        make_hf_llama(root / name)
        weights = load_file(root / name / SAFE)
        save_file({k: w + seed * 0.01 for k, w in weights.items()}, root / name / SAFE, {"format": "pt"})
    return root


def weights_of(models: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(models / name / SAFE)


Put = Callable[[Path, dict[str, torch.Tensor]], None]


def single(name: str = SAFE) -> Put:
    def put(folder: Path, weights: dict[str, torch.Tensor]) -> None:
        if name.endswith(".bin"):
            torch.save(weights, folder / name)
        else:
            save_file(weights, folder / name, {"format": "pt"})

    return put


def sharded(lead: str = SAFE, lost: tuple[int, ...] = (), index: bool = True, named: str | None = None) -> Put:
    """Two shards and their index; ``lost``: shards that are not there, ``named``: the pattern of their names."""

    def put(folder: Path, weights: dict[str, torch.Tensor]) -> None:
        stem, end = lead.rsplit(".", 1)
        files = [(named or f"{stem}-{{:05d}}-of-00002.{end}").format(i) for i in (1, 2)]
        weight_map = {name: files[i % 2] for i, name in enumerate(sorted(weights))}
        for i, file in enumerate(files, 1):
            if i not in lost:
                single(file)(folder, {n: weights[n] for n in weights if weight_map[n] == file})
        if index:
            text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
            (folder / f"{lead}.index.json").write_text(text)

    return put


def config(**fields: object) -> Put:
    def put(folder: Path, weights: dict[str, torch.Tensor]) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return put


def shards_of_more(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """What an earlier save in three shards left."""
    single("model-00003-of-00003.safetensors")(folder, {"model.norm.weight": weights["model.norm.weight"]})


def mixed(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """An index that names the single file alone, as some tools write it."""
    single()(folder, weights)
    weight_map = dict.fromkeys(weights, SAFE)
    (folder / f"{SAFE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def below(name: str, put: Put) -> Put:
    def put_below(folder: Path, weights: dict[str, torch.Tensor]) -> None:
        (folder / name).mkdir()
        put(folder / name, weights)

    return put_below


INDEX, OLD_INDEX = f"{SAFE}.index.json", f"{PICKLED}.index.json"
# what is put into the folder (whose weights, how), the weights that are read, the files that are named as ignored
READ: dict[str, tuple[list[tuple[str, Put]], str, str | None]] = {
    "single": ([("a", single())], "a", None),
    "shards": ([("a", sharded())], "a", None),
    "pickle": ([("a", single(PICKLED))], "a", None),
    "pickled shards": ([("a", sharded(PICKLED))], "a", None),
    "an index of the single file alone": ([("a", mixed)], "a", None),
    "shards of other names": ([("a", sharded(named="part{}.safetensors"))], "a", None),
    "saved again, the old index left": ([("b", sharded(lost=(1, 2))), ("a", single())], "a", f"{INDEX} is"),
    "saved again, a shard left": (
        [("b", sharded(lost=(1,))), ("a", single())],
        "a",
        f"{INDEX}, model-00002-of-00002.safetensors are",
    ),
    "saved again, shards and index left": (
        [("b", sharded()), ("a", single())],
        "a",
        f"{INDEX}, model-00001-of-00002.safetensors, model-00002-of-00002.safetensors are",
    ),
    "saved again, shards left without index": (
        [("b", sharded(index=False)), ("a", single())],
        "a",
        "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors are",
    ),
    "saved again, the old index broken": (
        [("a", single()), ("a", lambda folder, _: (folder / INDEX).write_text("{"))],
        "a",
        f"{INDEX} is",
    ),
    "saved again in fewer shards": ([("a", sharded()), ("b", shards_of_more)], "a", "model-00003-of-00003.saf.* is"),
    "safetensors and pickle": ([("a", single()), ("b", single(PICKLED))], "a", f"{PICKLED} is"),
    "shards and pickle": ([("a", sharded()), ("b", single(PICKLED))], "a", f"{PICKLED} is"),
    "single and pickled shards": (
        [("a", single()), ("b", sharded(PICKLED))],
        "a",
        f"{OLD_INDEX}, pytorch_model-00001-of-00002.bin, pytorch_model-00002-of-00002.bin are",
    ),
    "pickle and pickled shards": (
        [("a", single(PICKLED)), ("b", sharded(PICKLED, lost=(1,)))],
        "a",
        f"{OLD_INDEX}, pytorch_model-00002-of-00002.bin are",
    ),
    "all four": (
        [("a", single()), ("b", sharded()), ("c", single(PICKLED)), ("b", sharded(PICKLED))],
        "a",
        f"{INDEX}, {PICKLED}, {OLD_INDEX} and 4 more are",
    ),
    "a variant": ([("a", single()), ("b", single("model.fp16.safetensors"))], "a", "model.fp16.safetensors is"),
    "its maker's own format": ([("a", sharded()), ("b", single("consolidated.safetensors"))], "a", "consolidated.* is"),
    "a subfolder": ([("a", single(PICKLED)), ("b", below("original", single()))], "a", None),
    "a file that config.json names": (
        [("a", single("mine.safetensors")), ("b", single()), ("a", config(transformers_weights="mine.safetensors"))],
        "a",
        f"{SAFE} is",
    ),
    "an index that config.json names": (
        [
            ("a", sharded("mine.safetensors")),
            ("b", single()),
            ("a", config(transformers_weights="mine.safetensors.index.json")),
        ],
        "a",
        f"{SAFE} is",
    ),
}  # fmt: skip


def make(models: Path, folder: Path, puts: list[tuple[str, Put]]) -> Path:
    folder.mkdir()
    shutil.copy(models / "a" / "config.json", folder / "config.json")
    for name, put in puts:
        put(folder, weights_of(models, name))
    return folder


@torch.no_grad()
def logits_there(folder: Path) -> torch.Tensor:
    """The logits of what transformers loads from a folder, in which it finds every weight."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()(IDS).logits


@torch.no_grad()
def logits_here(folder: Path) -> torch.Tensor:
    return load_model(convert_checkpoint(ConvertArgs(checkpoint_dir=str(folder))))(IDS)


def test_the_three_models_differ(models: Path) -> None:
    a, b, c = (logits_there(models / name) for name in "abc")
    assert min((a - b).abs().max(), (a - c).abs().max(), (b - c).abs().max()) > 1e-2


@pytest.mark.parametrize("case", READ)
def test_the_weights_are_those_that_transformers_reads(
    models: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture
) -> None:
    puts, read, ignored = READ[case]
    folder = make(models, tmp_path / "hub", puts)
    there = logits_there(folder)
    assert (there - logits_there(models / read)).abs().max() < 1e-5
    capsys.readouterr()
    assert (logits_here(folder) - there).abs().max() < 1e-5
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("notice: ")]
    assert len(lines) == (ignored is not None)
    if ignored:
        assert re.fullmatch(rf"notice: {folder}: \S+ is read; {ignored} ignored, in transformers' order; .*", lines[0])
    assert not missing_files(folder)
    out = export_hf(ExportHFArgs(checkpoint_dir=str(folder), out_dir=str(tmp_path / "out")))
    assert (logits_there(out) - there).abs().max() < 1e-5


@pytest.mark.parametrize("case", READ)
def test_doctor_and_verify_look_at_the_same_files(
    models: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture, tokenizer_model: bytes
) -> None:
    puts, _, ignored = READ[case]
    folder = make(models, tmp_path / "hub", puts)
    (folder / "tokenizer.model").write_bytes(tokenizer_model)
    convert_verified(ConvertArgs(checkpoint_dir=str(folder)))
    assert "verified: 256 positions" in capsys.readouterr().out
    examine(DoctorArgs(checkpoint_dir=str(folder)))
    text = capsys.readouterr().out
    assert (re.search(rf"\nsuspicious: .*{ignored} ignored", text) is not None) == (ignored is not None), text
    assert len(re.findall(r"\nsuspicious: .* is read; ", text)) == (ignored is not None)


@pytest.mark.parametrize("sizes", [("100KB", "10MB"), ("10MB", "100KB"), ("100KB", "200KB")])
def test_a_folder_that_transformers_saved_again(models: Path, tmp_path: Path, sizes: tuple[str, str]) -> None:
    """In one file or in more and fewer shards, over what it had saved first; whatever it leaves there."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "hub"
    for name, size in zip("ba", sizes, strict=True):
        AutoModelForCausalLM.from_pretrained(models / name).save_pretrained(folder, max_shard_size=size)
    assert (logits_here(folder) - logits_there(folder)).abs().max() < 1e-5
    assert (logits_here(folder) - logits_there(models / ("b" if sizes[0] == "10MB" else "a"))).abs().max() < 1e-5


# what transformers stops at or fills with random weights: the weights that are read all the same, and what is said
PASSED = {
    "a shard is missing, the pickle is whole": (
        [("b", sharded(lost=(2,))), ("a", single(PICKLED))],
        rf"{PICKLED} is read; {INDEX} is ignored \(\S+/model-00002-of-00002.safetensors is missing, though the index",
    ),
    "the index is broken, the pickle is whole": (
        [("a", single(PICKLED)), ("a", lambda folder, _: (folder / INDEX).write_text("[]"))],
        rf"{PICKLED} is read; {INDEX} is ignored \(.* holds a list, not an object\)",
    ),
}


@pytest.mark.parametrize("case", PASSED)
def test_a_set_that_is_not_whole_is_passed_over_by_name(
    models: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture
) -> None:
    puts, says = PASSED[case]
    folder = make(models, tmp_path / "hub", puts)
    with pytest.raises((OSError, TypeError)):
        logits_there(folder)
    capsys.readouterr()
    assert (logits_here(folder) - logits_there(models / "a")).abs().max() < 1e-5
    assert re.search(f"notice: {folder}: {says}", capsys.readouterr().out)
    with pytest.raises(InputError, match=rf"transformers would stop at \S+{INDEX} .*; delete that file, or leave"):
        convert_verified(ConvertArgs(checkpoint_dir=str(folder)))


REFUSED = {
    "a shard is missing": (
        [("a", sharded(lost=(2,)))],
        rf"model-00002-of-00002.safetensors is missing, though the index names it; download again .* remove {INDEX}",
    ),
    "all shards are missing": ([("a", sharded(lost=(1, 2)))], r"model-00001-\S+ \(and 1 more\) is missing"),
    "shards without an index": (
        [("a", sharded(index=False))],
        rf"model-00001-of-00002.safetensors, model-00002-of-00002.safetensors are shards without {INDEX}; fetch that",
    ),
    "pickled shards without an index": ([("a", sharded(PICKLED, index=False))], rf"shards without {OLD_INDEX}; fetch"),
    "a pickled shard is missing": ([("a", sharded(PICKLED, lost=(1,)))], "pytorch_model-00001-of-00002.bin is missing"),
    "a variant alone": (
        [("a", single("model.fp16.safetensors"))],
        r"model.fp16.safetensors is no file .* rename it so",
    ),
    "its maker's own format alone": (
        [("a", single("consolidated.safetensors"))],
        "consolidated.safetensors is no file",
    ),
    "in a subfolder": ([("a", below("original", single()))], r"hub/original does, which is not looked into: move"),
    "nothing": ([], r"holds no model.safetensors or pytorch_model.bin, whole or sharded; download it first"),
    "the file that config.json names is missing": (
        [("a", single()), ("a", config(transformers_weights="mine.safetensors"))],
        "mine.safetensors is missing, though config.json names it",
    ),
    "config.json names what lies elsewhere": (
        [("a", single()), ("a", config(transformers_weights="../a/model.safetensors"))],
        "transformers_weights is '../a/model.safetensors', no safetensors file of",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_where_nothing_is_whole_the_file_to_fetch_or_to_remove_is_named(
    models: Path, tmp_path: Path, case: str
) -> None:
    puts, says = REFUSED[case]
    folder = make(models, tmp_path / "hub", puts)
    with pytest.raises((OSError, ValueError)):
        logits_there(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match=says):
        logits_here(folder)
    assert sorted(folder.rglob("*")) == before


def test_a_single_file_that_lacks_weights_is_named_with_what_it_hides(models: Path, tmp_path: Path) -> None:
    """transformers would fill the gap with random weights."""

    def partial(folder: Path, weights: dict[str, torch.Tensor]) -> None:
        single()(folder, {name: w for name, w in weights.items() if name != "model.norm.weight"})

    folder = make(models, tmp_path / "hub", [("a", sharded()), ("b", partial)])
    with pytest.raises(
        InputError, match=rf"'model.norm.weight' is missing .*; {folder}: {SAFE} is read; {INDEX}, model"
    ):
        logits_here(folder)


def test_an_adapter_in_the_folder_is_named(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """transformers puts it on the model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = make(models, tmp_path / "hub", [("a", single())])
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    adapted.save_pretrained(folder)
    with torch.no_grad():
        there = AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits
    assert (there - logits_there(models / "a")).abs().max() > 1e-3
    assert (logits_here(folder) - logits_there(models / "a")).abs().max() < 1e-5
    assert "notice: adapter_config.json is an adapter of peft, which is not applied here" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"--verify: .*adapter_config.json is an adapter of peft.*; move it away"):
        convert_verified(ConvertArgs(checkpoint_dir=str(folder)))
