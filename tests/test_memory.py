"""What a process is told of its memory, against what the system counts."""

import os

import torch

from lit_sft.memory import free_memory, peak_memory, resident_memory


def test_a_tensor_is_resident_and_was() -> None:
    before, peak = resident_memory(), peak_memory(torch.device("cpu"))
    tensor = torch.ones(2**26)
    assert resident_memory() - before > 0.9 * tensor.nbytes
    assert peak_memory(torch.device("cpu")) >= max(peak, resident_memory() - 2**20)
    assert resident_memory() < free_memory("cpu") < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
