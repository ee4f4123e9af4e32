"""One buffer for all tensors of a row: values, places, and one transfer."""

import pytest
import torch
from torch import Tensor

from lit_sft import upload as module
from lit_sft.attention import Layout
from lit_sft.batches import Row
from lit_sft.upload import ALIGNMENT, pack, unpack, upload

TENSORS = {
    "ids": torch.arange(7),
    "ends": torch.tensor([0, 3, 7], dtype=torch.int32),
    "none": torch.empty(0, dtype=torch.int64),
    "flags": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "matrix": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).T,  # columns before rows in memory
    "narrow": torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "no rows": torch.empty(0, 4),
    "last": torch.arange(33, dtype=torch.uint8),
}


class FakeGPU:
    """Looks like a CUDA device to ``upload``."""

    type = "cuda"


class Pinned:
    """A buffer in memory that a GPU copies from; counts the transfers."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer, self.moved = buffer, []

    def to(self, device: FakeGPU, non_blocking: bool = False) -> Tensor:
        self.moved.append((device, non_blocking))
        return self.buffer.clone()


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    assert list(found) == list(expected)
    pairs = [(found[name], expected[name]) for name in expected]
    return all(a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def test_tensors_come_out_as_they_went_in() -> None:
    buffer = pack(TENSORS)
    views = unpack(buffer, TENSORS)
    assert same(views, TENSORS)
    assert buffer.dtype == torch.uint8 and len(buffer) % ALIGNMENT == 0
    start = buffer.data_ptr()
    ends = [start]
    for view in (view for view in views.values() if view.numel()):
        assert (view.data_ptr() - start) % ALIGNMENT == 0
        assert view.data_ptr() >= ends[-1], "one overlaps the one before"
        ends.append(view.data_ptr() + view.nbytes)
    assert ends[-1] <= start + len(buffer)
    assert same(unpack(pack({"none": TENSORS["none"]}), {"none": TENSORS["none"]}), {"none": TENSORS["none"]})


def test_a_gpu_gets_one_transfer_that_nobody_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Pinned] = []

    def pinning(tensors: dict[str, Tensor], device: str = "cpu", pinned: bool = False) -> Pinned:
        assert pinned
        made.append(Pinned(pack(tensors, device)))
        return made[-1]

    monkeypatch.setattr(module, "pack", pinning)
    device = FakeGPU()
    assert same(upload(TENSORS, device), TENSORS)
    assert [buffer.moved for buffer in made] == [[(device, True)]]


def test_on_a_cpu_nothing_is_copied() -> None:
    found = upload(TENSORS, torch.device("cpu"))
    assert same(found, TENSORS)
    assert all(found[name].data_ptr() == tensor.data_ptr() for name, tensor in TENSORS.items())


@pytest.mark.parametrize("parents", [None, [None, 0, 0]])
def test_a_row_takes_its_layout_along(parents: list | None, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, device = Layout([3, 2, 4], parents), torch.device("meta")
    counts = torch.ones(2, dtype=torch.int64) if parents else None
    row = Row(torch.arange(9), layout, torch.tensor([2, 5]), torch.tensor([3, 6]), counts, [0, 1, 2])
    moved = row.to(device)
    placed = layout.tensors()
    monkeypatch.setattr(Layout, "tensors", lambda self: pytest.fail("made a second time"))
    there = moved.layout.on(device)
    assert moved.input_ids.device.type == moved.labels.device.type == moved.positions.device.type == "meta"
    assert (moved.counts is None) == (counts is None) and moved.examples == row.examples
    found = {"positions": there.positions, "totals": there.totals}
    found |= {"query_ends": there.spans.query_ends, "key_ends": there.spans.key_ends}
    if parents:
        found |= there.spans.keys._asdict()
    assert found.keys() == placed.keys()
    assert all(
        x.device == device and x.shape == placed[n].shape and x.dtype == placed[n].dtype for n, x in found.items()
    )
    assert (there.spans.most_queries, there.spans.most_keys) == ((4, 7) if parents else (4, 4))
    assert moved.to(device) is moved


def test_a_layout_made_from_another_has_tensors_of_its_own() -> None:
    from dataclasses import replace

    layout, cpu = Layout([3, 2]), torch.device("cpu")
    assert len(layout.on(cpu).positions) == 5
    assert len(replace(layout, lengths=[3, 9]).on(cpu).positions) == 12
