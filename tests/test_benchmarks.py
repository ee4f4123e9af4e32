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


def test_work_has_its_category() -> None:
    from profiling import Work, classify

    def kind(operator: str, kernel: str, sizes: list, **more: object) -> str:
        return classify(Work(operator, kernel, sizes, 1.0, **more), 512)

    assert kind("aten::mm", "", [[100, 64], [64, 64]]) == "base products"
    assert kind("aten::mm", "nvjet_tst_128x64", [[100, 64], [64, 16]]) == "LoRA forward"
    assert kind("aten::mm", "nvjet_tst_128x64", [[100, 64], [64, 48]], backward=True) == "LoRA backward"
    copied = {"around": "aten::addmm", "wide": ([[100, 64], [100, 16], [16, 64]],)}
    assert kind("aten::copy_", "Memcpy DtoD", [[100, 64]], **copied) == "LoRA forward"
    assert kind("aten::_scaled_mm", "sm90_xmma_gemm_e4m3", [[100, 64], [64, 160]]) == "base products"
    assert kind("aten::mm", "", [[100, 64], [64, 512]]) == "head and loss"
    assert kind("aten::_softmax", "softmax_warp", [[100, 512]]) == "head and loss"
    assert kind("aten::_flash_attention_forward", "flash_fwd_kernel", [[1, 4, 100, 16]]) == "attention"
    assert kind("aten::_fused_adamw_", "multi_tensor_apply_kernel", [[]]) == "optimizer"
    assert kind("triton_poi_fused_mul_silu_0", "triton_poi_fused_mul_silu_0", []) == "elementwise"
    assert kind("", "triton_poi_fused__to_copy_3", []) == kind("", "triton_poi_fused__to_copy_t_12", []) == "casts"
    assert kind("", "triton_poi_fused_clone_transpose_2", []) == "layout copies"
    assert kind("", "triton_poi_fused__to_copy_add_mul_3", []) == "elementwise"
    assert kind("aten::_index_put_impl_", "indexing_backward", [[100, 4, 16], [], [130, 4, 16]]) == "prefix gather"
    assert kind("aten::index", "index_elementwise", [[100, 64], []]) == "head and loss"
    assert kind("aten::copy_", "Memcpy DtoD", [[100, 64]]) == "copies"


def test_kernels_of_a_gpu_are_counted_once() -> None:
    """Those of operators under these, the rest by their names; spans that name a part of the code are none."""
    from types import SimpleNamespace as Event

    from profiling import works
    from torch.autograd import DeviceType

    def event(name: str, kind: DeviceType, span: tuple[int, int], **more: object) -> Event:
        facts = {"thread": 1, "kernels": [], "cpu_parent": None, "input_shapes": [], "is_user_annotation": False}
        return Event(name=name, device_type=kind, time_range=Event(start=span[0], end=span[1]), **(facts | more))

    kernel = Event(name="nvjet", duration=30)
    outer = event("aten::linear", DeviceType.CPU, (0, 5), input_shapes=[[9, 64]])
    events = [
        outer,
        event("aten::mm", DeviceType.CPU, (1, 2), kernels=[kernel], cpu_parent=outer, thread=2),
        event("nvjet", DeviceType.CUDA, (10, 40)),
        event("triton_poi_fused_add_0", DeviceType.CUDA, (40, 50)),
        event("Optimizer.step#AdamW.step", DeviceType.CUDA, (10, 90), is_user_annotation=True),
    ]
    product, rest = works(events, on_gpu=True)
    assert (product.operator, product.seconds, product.around, product.backward) == (
        "aten::mm",
        3e-5,
        "aten::linear",
        True,
    )
    assert (rest.kernel, rest.seconds) == ("triton_poi_fused_add_0", pytest.approx(1e-5))


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
    """Stages in processes of their own, their findings, the tables; both whole calls take minutes."""
    out = tmp_path / "out"
    command = [sys.executable, BENCHMARKS / "gpu.py", "--out", out, "--call", "A", "--device", "cpu"]
    command += ["--shape", "tiny", "--stages", "micro", "tests", "litgpt"]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stages = json.loads((out / "gpu_A.json").read_text())["stages"]
    assert list(stages) == ["micro", "tests", "litgpt"] and "| 64 × 64, bf16, forward |" in done.stdout
    found = stages["micro"]["findings"]
    assert "bf16" in {f.get("ceiling") for f in found}
    assert next(f for f in found if f.get("note", "").startswith("prefix gather"))["differences"][0] < 1e-3
    assert stages["tests"]["findings"] == [{"failed": "needs a GPU"}]
    assert not any("ended" in finding for stage in stages.values() for finding in stage["findings"])
    assert {path.name for path in out.iterdir()} == {"gpu_A.json", "gpu_A.jsonl", "logs_A.zip"}


def test_calls_are_short() -> None:
    """What is promised of a lent machine's time."""
    from gpu import BUDGET_S, STAGES

    limits = {call: sum(stage.limit_s for stage in STAGES.values() if stage.call == call) for call in BUDGET_S}
    assert limits["A"] <= 280 and limits["B"] <= 330
    assert all(stage.compile_s is None or stage.compile_s < stage.limit_s for stage in STAGES.values())


@pytest.mark.parametrize("cut", [False, True], ids=["failed", "compiling too long"])
def test_a_stage_is_tried_again_without_compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: bool) -> None:
    import argparse

    import gpu

    monkeypatch.setitem(gpu.STAGES, "bf16", gpu.Stage("A", 60, 0.5))
    monkeypatch.setattr(gpu, "ON_CPU", 1)
    args = argparse.Namespace(out=tmp_path, call="A", budget_s=100, device="cpu", compile=True, commit=None)
    call = gpu.Call(args, tmp_path)
    tried = []

    def prepare(name: str, *flags: str) -> subprocess.Popen:
        tried.append(flags)
        (tmp_path / f"{name}.log").write_text("its last words")
        code = "import time; time.sleep(60)" if cut else "raise SystemExit(3)"
        if flags:
            line = json.dumps({"stage": name, "note": "done"})
            code = f"open({str(call.lines)!r}, 'a').write({line!r} + chr(10))"
        return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, start_new_session=True)

    monkeypatch.setattr(call, "_prepare", prepare)
    call.waiting["bf16"] = prepare("bf16")
    stage = call._stage("bf16")
    why = "no step was made within" if cut else "exit status 3"
    first, second = stage["findings"]
    assert why in first["failed"] and first["log"] == "its last words" and second == {"note": "done"}
    assert tried == [(), ("--no-compile",)] and not stage["compiled"]


def test_memory_that_ends_is_a_finding() -> None:
    from gpu_stages import within_memory

    def fail(error: Exception) -> None:
        raise error

    assert within_memory(divmod, 7, 2) == ((3, 1), "")
    for error in (
        MemoryError("step 1"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("a, out of memory"),
    ):
        result, why = within_memory(fail, error)
        assert result is None and why == f"out of memory: {error}"
    with pytest.raises(RuntimeError, match="else"):
        within_memory(fail, RuntimeError("else"))


def test_clocks_are_those_of_a_busy_card(tmp_path: Path) -> None:
    from clocks import Clocks

    path = tmp_path / "clocks.csv"
    line = "2026/11/27 01:00:00.000, {}, 2619, {}, 40, {}, 100, 0x0000000000000004"
    lines = [line.format(345, 90, 0), line.format(1500, 650, 99), line.format(1980, 500, 80), "2026/11/27 01:0"]
    path.write_text("\n".join([line.format(1980, 700, 100), *lines]))
    clocks = Clocks(path, wanted=False)
    assert clocks.count() == 4
    found = clocks.summary(first=1)
    assert found["samples"] == 2 and found["sm_mhz"] == {"median": 1740, "least": 1500, "most": 1980}
    assert found["power_w"]["most"] == 650 and Clocks(tmp_path / "none", wanted=False).summary(0) == {}


def test_tables_of_whatever_is_there() -> None:
    from gpu import complete
    from tables import tables

    machine = {"device": "NVIDIA H200", "driver": "580", "python": "3", "versions": {"torch": "2"}, "commit": "abc"}
    case = {"shape": "llama-7b", "data": "alpaca", "micro_batch_tokens": 512, "share_prefix": True, "quantize": None,
            "activation_checkpointing": "none"}  # fmt: skip
    speed = {"tokens_per_s": 19_500.0, "flop_per_s": 4e14, "peak_bytes": 2**35, "compilations": 2, "recompilations": 0,
             "compiled": True, "microseconds": {"base products": 38.0, "optimizer": 0.5, "gaps": 0.5}}  # fmt: skip
    peer = {"tool": "litgpt", "micro_batch": 4, "tokens_per_s": 5000.0, "flop_per_s": 1e14, "peak_bytes": 2**34}
    top = {"ceiling": "bf16", "layers": "separate", "burst_flop_per_s": 1e15, "sustained_flop_per_s": 8e14}
    found = [case | speed | {"first_losses": [2.5]}, peer, top, {"ended": "cut after 9 s", "log": "no\nwhy\n"}]
    found += [{"micro": "copy", "seconds": 1e-3, "predicted_s": 2e-3, "flop": 0, "bytes": 4e9}]
    stage = {"seconds": 30.0, "compiled": True, "clocks": {}, "findings": found}
    result = {"machine": machine, "stages": {"bf16": stage, "large": {"findings": [{"failed": "left out"}]}}}
    complete(result, [case | {"estimate_bytes": 2**35 * 0.9}])
    assert found[0]["share_of_burst"] == 0.4 and found[0]["device"] == "NVIDIA H200"
    text = tables(result)
    speed_row = (
        "| llama-7b, bf16, alpaca, 512, prefixes | 19,500 | 19,000 | 23,500 | 400 | 50% | 32.0 | 0.0 | -10% |  |"
    )
    assert speed_row in text and "| base products | 38.00 | 37 | 36.7 |" in text
    assert "| optimizer, host | 1.00 | 0.7 | 0.2 |" in text and "| copy | 1,000 | 2,000 |  | 4,000 |" in text
    assert "litgpt, micro-batch 4" in text and "bf16:  cut after 9 s why" in text and "large:  left out" in text
    assert "graphs" not in tables({"machine": machine, "stages": {}})


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
