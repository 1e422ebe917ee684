"""Every way in which CUDA, NCCL and gloo fail has its sentence, and no mistake of ours has one."""

import ast
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ldt.errors import InputError, RunError, by_reason, file_error, in_a_sentence

NCCL = "NCCL error in: torch/csrc/distributed/c10d/NCCLUtils.cpp:94, "
WORDS = {  # as torch 2.13, NCCL 2.27 and CUDA 12 say it
    "a GPU has no memory left": [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "NCCL error in: x.cpp:1, unhandled cuda error, NCCL version 2.27.3\nncclUnhandledCudaError: Call to "
        "CUDA library "
        "failed.\nLast error:\nFailed to CUDA calloc async 608 bytes",
        NCCL + "unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY",
    ],
    "a node has no memory left": [
        "[enforce fail at alloc_cpu.cpp:125] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate "
        "8589934592 bytes. Error code 12 (Cannot allocate memory)",
        "unable to mmap 1024 bytes: Cannot allocate memory (12)",
    ],
    "a disk is full": [
        "[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0",
        "PytorchStreamWriter failed writing file data/0: file write failed",
        "backend='inductor' raised:\nOSError: [Errno 28] No space left on device: '/tmp/torchinductor_root/x'",
    ],
    "a GPU has failed": [
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: hardware stack error",
        "CUDA error: unknown error",
        "CUDA error: uncorrectable NVLink error detected during the execution",
        "Unable to determine the device handle for GPU 0000:0F:00.0: GPU has fallen off the bus",
    ],
    "a kernel failed on a GPU": [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: unspecified launch failure",
        "CUDA error: misaligned address",
        "CUDA error: an illegal instruction was encountered",
        "CUDA error: the launch timed out and was terminated",
        "CUDA error: device-side assert triggered",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( ...)`",
    ],
    "this torch does not fit": [
        "CUDA error: no kernel image is available for execution on the device",
        "CUDA error: CUDA driver version is insufficient for CUDA runtime version",
        "CUDA error: forward compatibility was attempted on non supported HW",
    ],
    "a GPU can't be used": [
        "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
        "CUDA error: all CUDA-capable devices are busy or unavailable",
        "CUDA error: system not yet initialized",
        "CUDA error: invalid device ordinal",
        "No CUDA GPUs are available",
    ],
    "two ranks have the same GPU": [
        NCCL
        + "invalid usage, NCCL version 2.27.3\nncclInvalidUsage: This usually reflects invalid usage of NCCL library."
        "\nLast error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000",
    ],
    "another rank is gone": [
        NCCL
        + "remote process exited or there was a network error, NCCL version 2.26.2\nncclRemoteError: A call failed "
        "possibly due to a network error or a remote process exiting prematurely.",
        NCCL
        + "unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.3\nncclSystemError: System "
        "call (e.g. socket, malloc) or external library call failed or device error. It can be also caused by "
        "unexpected "
        "exit of a remote peer, you can check NCCL warnings for failure reason and see if there is connection "
        "closure by a "
        "peer.\nLast error:\nsocketProgress: Connection closed by remote peer node2<43210>",
        "NCCL communicator was aborted on rank 3. Original reason for failure was: watchdog timeout",
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:3127",
        "[pair.cc:598] Read error [10.0.0.2]:3127: Connection reset by peer",
        "Broken pipe",
    ],
    "another rank did not come in time": [
        "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=19, OpType=ALLREDUCE, "
        "Timeout(ms)=1800000) "
        "ran for 1800023 milliseconds before timing out.",
        "wait timeout after 300000ms, keys: /ldt-0//default_pg/0//cuda//ncclUniqueId",
        "[unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete",
        "Socket Timeout",
        "The client socket has timed out after 300000ms while trying to connect: Connection timed out",
    ],
    "the network between the GPUs failed": [
        NCCL + "unhandled system error, NCCL version 2.27.3\nncclSystemError: System call failed.\nLast error:\n"
        "Call to ibv_modify_qp failed with error Invalid argument",
        NCCL
        + "internal error - please report this issue to the NCCL developers\nncclInternalError: Internal check failed.",
        "[socket.cpp:1024] No route to host",
    ],
}


@pytest.mark.parametrize(("sentence", "words"), [(s, w) for s, all_words in WORDS.items() for w in all_words])
def test_what_a_library_says_is_a_sentence(sentence, words):
    with pytest.raises(RunError) as caught, in_a_sentence():
        raise RuntimeError(words)
    said = str(caught.value)
    assert said.startswith(sentence) and "\n" not in said and len(said) < 500
    assert said.endswith(")") and "()" not in said, "it quotes what was recognised"


def test_torchs_own_kinds_of_errors_are_known():
    for kind in (torch.AcceleratorError, torch.distributed.DistBackendError, torch.distributed.DistStoreError):
        assert issubclass(kind, RuntimeError), "in_a_sentence would not see it"
    with pytest.raises(RunError, match=r"train\.micro_batch=auto.*Tried to allocate"), in_a_sentence():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has 80 GiB.")


def test_too_much_memory_and_places_that_can_not_be_are_sentences(tmp_path):
    with pytest.raises(RunError, match="a node has no memory left; .* need less .Unable to allocate"), in_a_sentence():
        np.empty(1 << 59)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "below", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match=f"^{path} can't be used .*; give another path$"), in_a_sentence():
            path.write_text("x")


def test_a_full_disk_is_a_sentence():
    with pytest.raises(RunError, match="the disk is full"), in_a_sentence():
        Path("/dev/full").write_text("x")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_what_may_pass_keeps_no_job_from_being_tried_again(number):
    error = OSError(number, os.strerror(number))
    assert isinstance(by_reason("x", error), RunError) and isinstance(file_error("x", error, "y"), RunError)


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EMFILE, "ulimit -n"),
        (errno.ENOMEM, "has memory left"),
        (errno.EIO, "when its disk is back"),
        (errno.ENOSPC, "make room"),
        (errno.EACCES, "have its owner open it"),
        (errno.ENOTDIR, "what the caller says"),
    ],
)
def test_the_advice_is_that_of_the_reason(number, advice):
    """Too many open files used to wait for a disk to come back."""
    assert advice in str(file_error("shard x", OSError(number, os.strerror(number)), "what the caller says"))


def test_a_full_disk_says_which_file_has_no_room():
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/b")
    assert str(by_reason("choose another place", error)).startswith(
        "the disk of /a/b is full (No space left on device)"
    )
    assert str(by_reason("choose another place", OSError(errno.ENOSPC, "x"))) == "choose another place"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP])
def test_what_stays_wrong_does(number):
    error = OSError(number, os.strerror(number))
    assert isinstance(by_reason("x", error), InputError) and isinstance(file_error("x", error, "y"), InputError)


def test_whoever_catches_an_oserror_looks_at_its_reason():
    """A handler that makes each of them an InputError would end a job for good over a full or an absent disk."""
    for path in sorted((Path(__file__).parents[1] / "ldt").rglob("*.py")):
        for handler in ast.walk(ast.parse(path.read_text())):
            if not isinstance(handler, ast.ExceptHandler) or handler.type is None:
                continue
            caught = {n.id for n in ast.walk(handler.type) if isinstance(n, ast.Name)}
            if caught & {"OSError", "IOError", "EnvironmentError", "Exception", "BaseException"}:
                made = [n for n in ast.walk(handler) if isinstance(n, ast.Call) and ast.unparse(n.func) == "InputError"]
                assert not made, f"{path}:{made[0].lineno} is to say it by_reason"


FULL = """
import resource, signal, sys
import ast
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from ldt.dist import discover
from ldt.files import write_atomic, write_json
from ldt.run import owner, outcome
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
where = Path(sys.argv[2])
if sys.argv[1] == "outcome":
    outcome.begin(where)
resource.setrlimit(resource.RLIMIT_FSIZE, (4, 4))  # files can't grow, as on a full disk
if sys.argv[1] == "owner":
    with owner.owned(where, discover({})):
        pass
if sys.argv[1] == "outcome":
    outcome.write_outcome(where, 0, 7)
if sys.argv[1] == "json":
    write_json(where / "x.json", {"a": 1})
if sys.argv[1] == "atomic":
    write_atomic(where / "x.json", b"12345")
"""


@pytest.mark.parametrize("what", ["owner", "outcome", "json", "atomic"])
def test_a_full_disk_fails_and_leaves_nothing_half_written(tmp_path, what):
    done = subprocess.run([sys.executable, "-c", FULL, what, tmp_path], capture_output=True, text=True)
    assert "RunError: " in done.stderr, done.stderr
    left = {p.name: p.read_text() for p in tmp_path.iterdir()}
    assert set(left) == ({"outcome.json"} if what == "outcome" else set())
    assert what != "outcome" or json.loads(left["outcome.json"])["outcome"] == "running"


@pytest.mark.parametrize(
    "ours",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 4x3)"),
        RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"),
        FileNotFoundError(2, "No such file"),
        BrokenPipeError(32, "Broken pipe"),  # the command line has its own answer
        InputError("x"),
        KeyError("CUDA error: out of memory"),
    ],
    ids=repr,
)
def test_our_mistakes_keep_their_traceback(ours):
    with pytest.raises(type(ours)) as caught, in_a_sentence():
        raise ours
    assert caught.value is ours
