"""What a process is told of its memory, against what the system counts."""

import os

import torch

from lit_sft.memory import free_memory, peak_memory, ran_out, resident_memory


def test_a_tensor_is_resident_and_was() -> None:
    before, peak = resident_memory(), peak_memory(torch.device("cpu"))
    tensor = torch.ones(2**26)
    assert resident_memory() - before > 0.9 * tensor.nbytes
    assert peak_memory(torch.device("cpu")) >= max(peak, resident_memory() - 2**20)
    assert resident_memory() < free_memory("cpu") < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def compiling_failed(error: Exception) -> Exception:
    """What a frame that is being compiled raises for ``error`` within the compiler."""
    torch._dynamo.reset()

    def backend(*_: object) -> object:
        raise error

    try:
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    except Exception as raised:
        return raised
    raise AssertionError("the backend was not called")


def test_memory_that_ends_within_the_compiler_is_known_as_that() -> None:
    """It arrives inside the compiler's own error, by whatever way that was chained."""
    error = torch.OutOfMemoryError("CUDA out of memory")
    within = compiling_failed(error)
    assert type(within).__name__ == "BackendCompilerFailed" and not isinstance(within, torch.OutOfMemoryError)
    chained = RuntimeError("in a block")
    chained.__cause__ = within
    assert ran_out(error) and ran_out(within) and ran_out(chained)


def test_other_failures_are_not_about_memory() -> None:
    assert not ran_out(compiling_failed(ValueError("unsupported"))) and not ran_out(RuntimeError("shapes"))
