"""The programs under benchmarks/: what they count, draw and choose. Of the peers transformers and peft are enough."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs import their neighbours by bare names."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("BENCHMARK_STARTED", str(time.time()))
    yield
    for name in set(sys.modules) - before:  # which others could take for their own
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(BENCHMARKS)):
            del sys.modules[name]


class Products(TorchDispatchMode):
    """Counts the operations of matrix products, by torch's own formulas."""

    flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):  # into out= too
            self.flop += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def test_flop_are_those_torch_counts(tmp_path: Path) -> None:
    """Matrix products of one step; the first block's inputs need no gradient, which the formula does not know."""
    from engine import Training, lora_args, random_model, write_data
    from lengths import uniform
    from shapes import Shape

    from lit_sft.batches import TrainSteps
    from lit_sft.shards import Shards

    shape = Shape("llama", 64, 8, 4, 160, 512)
    folder = write_data(tmp_path / "data", uniform(4, 64, 512))
    args = lora_args(folder, device="cpu", global_batch_size=4)
    training = Training(random_model(shape, "cpu", torch.float32), args, compiled=False)
    counter = Products()
    with counter:
        records = training.run(TrainSteps(Shards(folder, "train"), args), args, 1, 1)
    assert records[0]["tokens"] == 256 and records[0]["labels"] == 4 * 48
    assert counter.flop == pytest.approx(256 * shape.flop_per_token(labelled=0.75, context=0), rel=0.03)


def test_the_7b_shape_costs_what_is_known() -> None:
    """Worked out by hand, in GFLOP a token: 28.6 packed to 2,048; 26.8 of Alpaca's lengths with 73 % labelled."""
    from shapes import SHAPES, mean_context

    shape = SHAPES["llama-7b"]
    assert shape.n_linear() == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert shape.flop_per_token(1, mean_context([2048])) == pytest.approx(28.6e9, rel=0.01)
    assert shape.flop_per_token(0.73, 167) == pytest.approx(26.8e9, rel=0.01)


def test_made_up_examples_have_the_lengths_and_preambles() -> None:
    from lengths import FILE, alpaca_like, lima_like

    facts = json.loads(FILE.read_text())
    examples = alpaca_like(1200, 1000)
    real = [(n_prompt, n_prompt + n_response) for _, n_prompt, n_response in facts["examples"]]
    assert [(example.n_prompt, len(example.ids)) for example in examples[:999]] == real
    kinds = [kind for kind, *_ in facts["examples"]]
    for kind, length in enumerate(facts["preambles"]):
        of_kind = [tuple(e.ids[:length]) for e, k in zip(examples, kinds, strict=False) if k == kind]
        assert len(set(of_kind)) == 1 and len(of_kind) > 300
        assert len({tuple(e.ids[: length + 2]) for e, k in zip(examples, kinds, strict=False) if k == kind}) > 300
    assert max(len(example.ids) for example in alpaca_like(500, 1000, longest=300)) == 300
    lima = lima_like(32000)
    assert len(lima) == 1030 and sum(len(example.ids) for example in lima) == pytest.approx(750_000, rel=1e-3)


def test_both_sides_train_the_same_model(tmp_path: Path) -> None:
    """Weights drawn by name: the first steps' losses of lit_sft and of transformers' Trainer with peft."""
    from engine import Training, lora_args, random_model, write_data
    from lengths import alpaca_like
    from peers import Transformers
    from shapes import SHAPES

    from lit_sft.batches import TrainSteps
    from lit_sft.shards import Shards

    examples = alpaca_like(64, SHAPES["tiny"].vocab_size, longest=90)
    folder = write_data(tmp_path / "data", examples)
    args = lora_args(folder, device="cpu", precision="bf16-true", global_batch_size=64)
    training = Training(random_model(SHAPES["tiny"], "cpu", torch.bfloat16), args, compiled=False)
    ours = training.run(TrainSteps(Shards(folder, "train"), args, share_prefix=True), args, 1, 1)
    side = Transformers("tiny", "cpu")
    _, theirs = side.run(examples, 16, grouped=False)
    assert ours[0]["loss"] == pytest.approx(theirs[0], abs=2e-3)
    assert ours[0]["computed"] < ours[0]["tokens"] == sum(len(example.ids) for example in examples)


@pytest.mark.parametrize("quantize", ["fp8", "nf4"])
def test_a_random_model_is_quantized_as_it_is_drawn(quantize: str) -> None:
    from engine import random_model
    from shapes import SHAPES

    from lit_sft.quantize import QuantizedLinear

    plain = random_model(SHAPES["tiny"], "cpu", torch.bfloat16)
    narrow = random_model(SHAPES["tiny"], "cpu", torch.bfloat16, quantize)
    layers = {n: m for n, m in narrow.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(layers) == 2 * 7 and not any(p.is_meta for p in narrow.parameters())
    for name, layer in layers.items():
        weight = plain.get_submodule(name).weight.float()
        assert (layer.weight(torch.float32) - weight).norm() < 0.11 * weight.norm()
    assert torch.equal(narrow.wte.weight, plain.wte.weight)


def test_operators_have_their_categories() -> None:
    from profiling import classify

    assert classify("aten::mm", "", [[100, 64], [64, 64]], 512) == "matrix products"
    assert classify("aten::mm", "nvjet_tst_128x64", [[100, 64], [64, 16]], 512) == "LoRA products"
    assert classify("aten::_scaled_mm", "sm90_xmma_gemm_e4m3", [[100, 64], [64, 160]], 512) == "matrix products"
    assert classify("aten::mm", "", [[100, 64], [64, 512]], 512) == "head and loss"
    assert classify("aten::_softmax", "softmax_warp", [[100, 512]], 512) == "head and loss"
    assert classify("aten::_flash_attention_forward", "flash_fwd_kernel", [[1, 4, 100, 16]], 512) == "attention"
    assert classify("aten::_fused_adamw_", "multi_tensor_apply_kernel", [[]], 512) == "optimizer"
    assert classify("triton_poi_fused_mul_silu", "triton_poi_fused_mul_silu_0", [], 512) == "elementwise"
    assert classify("aten::copy_", "Memcpy DtoD", [[100, 64]], 512) == "copies"


def test_a_profile_adds_up(tmp_path: Path) -> None:
    from profiling import profile
    from shapes import SHAPES

    weight = torch.randn(512, 64)
    found = profile(lambda: [torch.randn(256, 64) @ weight.T for _ in range(5)], "cpu", SHAPES["tiny"])
    assert {"head and loss", "elementwise", "gaps"} <= found["categories"].keys()
    assert sum(found["categories"].values()) == pytest.approx(found["profiled_seconds"])


def test_the_best_micro_batch_is_the_one_with_the_highest_median() -> None:
    from train import best

    def run(tool: str, size: int, speed: float, **more: object) -> dict:
        steps = [{"loss": 2.0}, {"loss": 1.0}]
        return {"tool": tool, "precision": "32-true", "micro_batch": size, "tokens_per_s": speed, "steps": steps,
                "above_weights_mb": 10.0 * size, "first_step_s": 1.0, **more}  # fmt: skip

    runs = [run("a", 1, 100), run("a", 1, 120), run("a", 1, 900), run("a", 2, 130), run("a", 2, 140), run("b", 1, 50)]
    runs.append({"tool": "b", "precision": "32-true", "micro_batch": 2, "failed": "no memory"})
    first, second = best(runs, flop_per_token=10, ceiling={"32-true": 2000})
    assert (first["tool"], first["micro_batch"], first["tokens_per_s"], first["above_weights_mb"]) == ("a", 2, 135, 20)
    assert (second["tool"], second["tokens_per_s"], second["share_of_ceiling"]) == ("b", 50, 0.25)


def test_the_gpu_program_on_a_cpu(tmp_path: Path) -> None:
    """One part in its own process, its findings, the tables, and a part that fails; the whole takes minutes."""
    out = tmp_path / "out"
    command = [sys.executable, BENCHMARKS / "gpu.py", "--out", out, "--device", "cpu", "--shape", "tiny"]
    command += ["--large_shape", "tiny", "--parts", "ceilings", "--micro_batch_tokens", "512"]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = json.loads((out / "gpu.json").read_text())["parts"]
    kinds = {f.get("kind") for f in parts["ceilings"]["findings"]}
    assert kinds == {None, "bf16", "fp8"} and "| tiny, fp8 |" in done.stdout
    assert not any("ended" in finding for finding in parts["ceilings"]["findings"])


def test_tables_of_whatever_is_there() -> None:
    from tables import gpu_tables, tables

    machine = {"device": "cpu", "python": "3", "cuda": None, "versions": {"torch": "2"}}
    case = {"shape": "tiny", "data": "alpaca", "micro_batch_tokens": 512, "share_prefix": True, "quantize": None,
            "activation_checkpointing": "none"}  # fmt: skip
    speed = {"tokens_per_s": 2000.0, "flop_per_s": 5e11, "peak_bytes": 2**31, "compilations": 2, "recompilations": 0}
    ceilings = [{"shape": "tiny", "kind": "bf16", "flop_per_s": 1e12}]
    found = [case | speed, case | {"failed": "out of memory: so much"}, {"ended": "the time was up", "log": ""}]
    text = tables({"parts": {"ceilings": machine | {"findings": ceilings}, "bf16": machine | {"findings": found}}})
    assert "| alpaca, 512, prefixes | 2,000 | 0.5 | 50% | 2.0 |  | 2 | 0 |  |" in text
    assert "out of memory: so much" in text and "bf16: ended early, the time was up" in text
    assert gpu_tables({"parts": {}}) == "nothing was measured\n"


# --- the laboratory: what is compiled for a GPU, without one ---

CODE = """
triton_poi_fused_clone_0 = async_compile.triton('triton_poi_fused_clone_0', '''
def triton_poi_fused_clone_0(in_ptr0, out_ptr0, xnumel, XBLOCK : tl.constexpr):
    tmp0 = tl.load(in_ptr0 + (x0), xmask).to(tl.float32)
    tmp1 = tmp0.to(tl.float32)
    tl.store(out_ptr0 + (x0), tmp1, xmask)
''', device_str='cuda')
triton_poi_fused_mul_1 = async_compile.triton('triton_poi_fused_mul_1', '''
def triton_poi_fused_mul_1(in_ptr0, out_ptr0, xnumel, XBLOCK : tl.constexpr):
    tmp0 = tl.load(in_ptr0 + (x0), xmask)
    tmp1 = tmp0 * tmp0
    tl.store(out_ptr0 + (x0), tmp1, xmask)
''', device_str='cuda')

def call(args):
    # extern_kernels.mm(nothing)
    triton_poi_fused_clone_0.run(arg0_1, buf0, s27, stream=stream0)
    triton_poi_fused_clone_0.run(arg1_1, buf1, s27, stream=stream0)
    triton_poi_fused_mul_1.run(buf0, buf2, s27, stream=stream0)
    extern_kernels.mm(reinterpret_tensor(buf2, (s27, 8), (8, 1), 0), buf1, out=buf3)
    extern_kernels.addmm(buf3, reinterpret_tensor(buf2, (s27, 8), (8, 1), 0), buf1, alpha=2.0, beta=1, out=buf4)
    extern_kernels.addmm(buf4, buf2, buf1, alpha=2.0, beta=1, out=buf4)
    extern_kernels.addmm(reinterpret_tensor(arg2_1, (s27, 8), (0, 1), 0), buf2, buf1, alpha=1, beta=1, out=buf5)
    buf6 = torch.ops.torch_attn._varlen_attn.default(buf4, buf4, buf4, arg3_1, arg3_1, 7, 7, True)
"""


@pytest.fixture
def laboratory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS / "laboratory")


def test_kernels_and_copies_are_counted_in_generated_code(laboratory: None) -> None:
    from reading import added_up, counted

    count = counted(CODE)
    assert count == {
        "triton": 3,
        "extern": {"addmm": 3, "mm": 1, "torch_attn._varlen_attn": 1},
        "copies": {"triton": 2, "addmm": 1},
    }
    assert added_up([count, count])["extern"]["addmm"] == 6
    assert added_up([]) == {"triton": 0, "extern": {}, "copies": {}}


def test_what_got_worse_is_said(laboratory: None) -> None:
    from comparison import table, worse

    work = {
        "triton": 3,
        "extern": {"mm": 2},
        "copies": {"triton": 1},
        "eager": {"aten.cat.default": 1},
        "eager_copies": 1,
    }
    before = {"bf16": {"graphs": 7, "waits": 30, "kept_kb": 90.0, "forward": work}, "gone": {"graphs": 1}}
    assert worse(before, before) == []
    assert worse(before, {"bf16": before["bf16"] | {"graphs": 1, "kept_kb": 90.1}}) == []
    now = {"bf16": {"graphs": 8, "waits": 30, "kept_kb": 91.0, "compiled_failed": "KeyError | of a kind"}, "new": {}}
    assert worse(before, now) == [
        "bf16: graphs rose from 7 to 8",
        "bf16: forward kernels was 6, now there is none",
        "bf16: forward copies was 2, now there is none",
        "bf16: KB kept a token rose from 90 to 91",
    ]
    assert "| bf16 | 7 |  | 3 + 2 + 1 (2) |  | 90 | 30 |  |  |  |" in table(before)
    built = {"built": {"90": {"built": 3, "failed": {"triton_a": "no"}}}}
    assert "| sm_90 3/4 |" in table({"bf16": built}) and "compiled: KeyError / of a kind |" in table(now)
    assert worse({"bf16": built}, {"bf16": {}}) == []
