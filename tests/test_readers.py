"""Whatever is in a file that says what others are, its reader gives sense or refuses in one line that names the file.

The readers of CSV and JSON rows have theirs in test_malformed.py and test_sources.py.
"""

import json
from pathlib import Path

import pytest
from bad_inputs import VALUES
from conftest import LLAMA
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reliability import make_checkpoint
from safetensors.torch import load_file

from lit_sft.atomic import Manifest
from lit_sft.checkpoint import read_adapter_config
from lit_sft.config import ModelConfig
from lit_sft.convert import source_weights
from lit_sft.documents import read_json
from lit_sft.errors import InputError
from lit_sft.families import find_family
from lit_sft.metrics import Metrics
from lit_sft.run_report import write_run_report
from lit_sft.states import read_state_facts
from lit_sft.tokenizer_config import TokenizerConfig

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ODD = st.sampled_from([v for v in VALUES if not isinstance(v, list | dict)]) | st.text(max_size=5) | st.floats()
ANY = st.recursive(ODD, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3))
SOUP = st.binary(max_size=60) | ANY.map(lambda value: json.dumps(value).encode())


def damaged(content: dict) -> st.SearchStrategy[bytes]:
    """A good file's fields, one to three of them gone or odd, or unknown ones beside them; or no JSON at all."""
    names = st.sampled_from(sorted(content)) | st.text(max_size=5)
    changes = st.dictionaries(names, ANY | st.just(...), min_size=1, max_size=3)
    whole = changes.map(lambda new: json.dumps({k: v for k, v in (content | new).items() if v is not ...}).encode())
    return SOUP | whole | st.tuples(whole, st.integers(0, 200)).map(lambda both: both[0][: both[1]])


def refuses_or_gives(path: Path, content: bytes, read: object) -> object:
    path.write_bytes(content)
    try:
        return read()
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return None


HF_CONFIG = {
    **LLAMA, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
    "rope_scaling": {"type": "linear", "factor": 2.0}, "tie_word_embeddings": False, "hidden_act": "silu",
    "sliding_window": None, "attention_bias": False, "torch_dtype": "float32", "head_dim": 16,
}  # fmt: skip


def read_config(path: Path) -> ModelConfig:
    content = read_json(path)
    return find_family(content).read_config(content)


TEXT = {key: value for key, value in HF_CONFIG.items() if key != "architectures"}
WRAPPED = {
    "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": TEXT,
    "vision_config": {"hidden_size": 32}, "tie_word_embeddings": False,
}  # fmt: skip
SIDE_BY_SIDE = TEXT | {
    "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "vision_config": {"depth": 1},
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "attention_bias": None,
}  # fmt: skip


@QUICK
@given(content=damaged(HF_CONFIG) | damaged(WRAPPED) | damaged({**WRAPPED, **TEXT}) | damaged(SIDE_BY_SIDE))
def test_config_json(tmp_path: Path, content: bytes) -> None:
    """What is accepted is a model whose sizes are positive and bounded."""
    path = tmp_path / "config.json"
    found = refuses_or_gives(path, content, lambda: read_config(path))
    if found is not None:
        assert isinstance(found, ModelConfig)
        assert 0 < found.n_layer <= 10_000 and 0 < found.n_embd <= 2**31 and 0 < found.head_size <= 2**31


OURS = dict.fromkeys(("n_layer", "n_head", "n_query_groups", "n_embd", "head_size", "intermediate_size"), 4)
OURS = json.loads(ModelConfig(**OURS, vocab_size=9, block_size=32).to_json())


@QUICK
@given(content=damaged(OURS))
def test_model_config_json(tmp_path: Path, content: bytes) -> None:
    found = refuses_or_gives(tmp_path / "model_config.json", content, lambda: ModelConfig.from_dir(tmp_path))
    assert found is None or found.n_head % found.n_query_groups == 0


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in one shard, which is read where an index says so."""
    raw = make_checkpoint(tmp_path_factory.mktemp("index") / "raw")
    (raw / "model.safetensors").rename(raw / "shard.safetensors")
    return raw


@settings(QUICK, max_examples=60)
@given(
    content=SOUP
    | st.dictionaries(
        st.sampled_from(["lm_head.weight", "model.norm.weight", "x", ""]),
        ANY | st.sampled_from(["shard.safetensors", "../raw/shard.safetensors", "lit_model.safetensors", "."]),
    ).map(lambda weight_map: json.dumps({"weight_map": weight_map}).encode())
)
def test_an_index(raw: Path, content: bytes) -> None:
    """What is accepted names files of the directory itself that hold what it says."""
    path = raw / "model.safetensors.index.json"
    found = refuses_or_gives(path, content, lambda: source_weights(raw))
    if found is not None:
        names = {weight.name for weight in found}
        assert names <= load_file(raw / "shard.safetensors").keys() | load_file(raw / "lit_model.safetensors").keys()
        assert all(Path(name).parent == Path() for name in json.loads(content)["weight_map"].values())


@QUICK
@given(content=damaged({"kind": "data", "facts": {}, "files": {"a": {"bytes": 1, "sha256": "0" * 64}},
                        "format_version": 1, "lit_sft_version": "1", "command": "x"}))  # fmt: skip
def test_a_manifest(tmp_path: Path, content: bytes) -> None:
    """What is accepted names files inside its directory, which are then compared without a traceback."""
    found = refuses_or_gives(tmp_path / "manifest.json", content, lambda: Manifest.read(tmp_path))
    if found is not None:
        assert all((tmp_path / name).resolve().is_relative_to(tmp_path) for name in found.files)
        refuses_or_gives(tmp_path / "manifest.json", content, lambda: found.check_files(tmp_path))


@QUICK
@given(content=damaged({"lora_r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "lora_mlp": True, "stop_ids": [2],
                        "prompt_style": "alpaca", "checkpoint_dir": "base", "base_fingerprint": "0"}))  # fmt: skip
def test_an_adapters_config(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    found = refuses_or_gives(tmp_path / "adapter_config.json", content, lambda: read_adapter_config(tmp_path))
    assert found is None or isinstance(found["checkpoint_dir"], str)


@QUICK
@given(content=damaged({"step": 3, "best_step": None, "best_val_loss": 1.5, "scaler": {}}))
def test_a_states_facts(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "step-00000003"
    folder.mkdir(exist_ok=True)
    found = refuses_or_gives(folder / "state.json", content, lambda: read_state_facts(folder))
    assert found is None or found["step"] == 3


TOKENS = {"add_bos_token": True, "eos_token": "</s>", "bos_token": {"content": "<s>"}, "chat_template": "x"}
TOKENS |= {"added_tokens_decoder": {"3": {"content": "<a>", "special": True}}}


@QUICK
@given(content=damaged(TOKENS))
def test_a_tokenizers_config(tmp_path: Path, content: bytes) -> None:
    found = refuses_or_gives(tmp_path / "tokenizer_config.json", content, lambda: TokenizerConfig.from_dir(tmp_path))
    assert found is None or all(isinstance(token.id, int) and token.text for token in found.added)


@QUICK
@given(content=damaged({"step": 1, "epoch": 1, "loss": 2.5, "lr": 1e-3, "grad_norm": None, "n_labels": 3, "n_tokens": 4,
                        "tokens_per_s": 9.5, "padding_share": 0.0, "peak_mem_bytes": 5, "seconds": 0.4, "spike": True,
                        "val_loss": 2.25}))  # fmt: skip
def test_a_record(tmp_path: Path, content: bytes) -> None:
    """What a run goes on from can be drawn in its end."""

    page = tmp_path / "report.html"
    page.unlink(missing_ok=True)

    def read() -> list[dict]:
        Metrics(tmp_path, 1, 2).close()
        write_run_report(tmp_path, {"checkpoint_dir": "base", "data_dir": "data"}, 2)
        return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    found = refuses_or_gives(tmp_path / "metrics.jsonl", content + b"\n", read)
    assert page.exists() == bool(found) and [record["step"] for record in found or ()] in ([], [1])
