"""Which errors of the libraries are no fault of the settings: the same command may well succeed."""

import errno
import multiprocessing

import pytest
import torch

from pipeline.base.errors import UnfinishedError, interruption_of, status_and_text

KILLED = RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed. It is possible that ...")
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("unable to mmap 512 bytes from file <x>: Cannot allocate memory (12)"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", [KILLED, *OUT_OF_MEMORY], ids=str)
def test_a_killed_loader_and_memory_that_runs_out_are_unfinished_with_advice(error: Exception) -> None:
    made = interruption_of(error)
    assert isinstance(made, UnfinishedError)
    assert ("memory ran out" in str(made)) == (error is not KILLED)
    assert "Run the same command again" in str(made)


def test_a_connection_to_a_process_that_died_is_told_from_one_to_a_server() -> None:
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    with pytest.raises(EOFError) as caught:
        ours.recv()
    assert isinstance(interruption_of(caught.value), UnfinishedError)
    assert interruption_of(ConnectionResetError(104, "Connection reset by peer")) is None


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(errno.ENOSPC, "full"), ValueError("x")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert interruption_of(error) is None


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3212"),
        RuntimeError("Read error [127.0.0.1]:3212: Connection reset by peer"),
        torch.distributed.DistBackendError("ncclRemoteError: a remote process exiting prematurely"),
        torch.distributed.DistNetworkError("failed to recv, got 0 bytes. Connection was likely closed."),
    ],
    ids=str,
)
def test_a_collective_that_fails_as_another_process_is_gone_is_no_bug(error: Exception) -> None:
    status, text = status_and_text(error)
    assert status == 1
    assert text.startswith("another process of this run has ended")
    assert "this is a bug" in status_and_text(RuntimeError("shapes differ"))[1]
