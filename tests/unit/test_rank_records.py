"""What ranks write about a run: errors, and the status of the newest attempt alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from distft.errors import DataError, Hang, RunError
from distft.runs.directory import RunDir
from distft.runs.failure import first_failure, hint_for, rank_errors
from distft.runs.status import read_status
from distft.train.status import StatusWriter
from distft.train.worker import record_error


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(str(tmp_path), "run")


@pytest.mark.parametrize(
    ("error", "by_the_user"),
    [
        (DataError("rows.jsonl:7: not JSON"), True),
        (RunError("what was saved is not what was trained"), True),
        (Hang("no step for 300 s"), False),  # a machine's fault, which another attempt may not meet
        (RuntimeError("CUDA error"), False),
    ],
)
def test_an_error_says_whether_only_the_user_can_fix_it(run: RunDir, error: Exception, by_the_user: bool) -> None:
    record_error(run, 3, error, where="node7")
    (found,) = rank_errors(run)
    assert (found["rank"], found["host"], found["user_error"]) == (3, "node7", by_the_user)
    assert (found["type"], found["message"]) == (type(error).__name__, str(error))


def test_the_newest_attempt_owns_the_status(run: RunDir) -> None:
    first, other_rank, second = StatusWriter(run, rank=0), StatusWriter(run, rank=1), StatusWriter(run, rank=0)
    first.begin()
    first.write(step=3)
    other_rank.write(step=99)
    assert (read_status(run).step, first.owns()) == (3, True)
    second.begin()
    assert (first.owns(), second.owns()) == (False, True)
    second.write(step=4)
    assert read_status(run).step == 4


def test_an_attempt_that_was_replaced_exits(run: RunDir) -> None:
    code = (
        "import sys; from pathlib import Path; from distft.runs.directory import RunDir\n"
        "from distft.runs.status import update_status; from distft.train.status import StatusWriter\n"
        "run = RunDir(Path(sys.argv[1])); writer = StatusWriter(run, 0); writer.begin(); writer.write(step=1)\n"
        "update_status(run, owner='another'); writer.update(step=2); print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "another attempt has taken over this run" in done.stderr
    assert read_status(run).step == 1


def test_a_full_disk_costs_only_what_may_be_lost(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from distft.train import status

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    writer = StatusWriter(run, rank=0)
    writer.begin()
    monkeypatch.setattr(status, "update_status", full)
    writer.update(step=2)
    with pytest.raises(OSError, match="No space left"):
        writer.write(step=2)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB"),
        ("AcceleratorError", "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        ("RuntimeError", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        ("RuntimeError", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        (
            "DistBackendError",
            "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO for details)\n"
            "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'",
        ),
        ("DistBackendError", "NCCL error\nLast error:\nFailed to CUDA calloc 6291456 bytes"),
        ("RuntimeError", "Error out of memory at line 380 in file /src/csrc/ops.cu"),
    ],
)
def test_out_of_gpu_memory_in_everyones_words(tmp_path: Path, kind: str, message: str) -> None:
    run = RunDir(tmp_path)
    run.logs.mkdir()
    record = {"rank": 1, "host": "a", "time": 1.0, "type": kind, "message": message, "user_error": False}
    run.rank_error(1).write_text(json.dumps(record | {"traceback": ""}))
    found = first_failure(run, 1)
    assert found.out_of_memory
    assert "hint: out of memory" in found.text


def test_host_memory_is_not_the_gpus(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.logs.mkdir()
    record = {"rank": 0, "host": "a", "time": 1.0, "type": "RuntimeError", "user_error": False, "traceback": ""}
    run.rank_error(0).write_text(json.dumps(record | {"message": "DefaultCPUAllocator: can't allocate memory"}))
    assert not first_failure(run, 1).out_of_memory


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (
            "ImportError: cannot import name 'Old' from 'transformers.x'",
            'pip install "distft[train]"',
        ),
        ("ImportError: cannot import name 'Old' from 'mine' (mine.py)", None),
        ("ImportError: libcudart.so.12: cannot open shared object file", None),
        ("ImportError: to use glue, install its dependencies", None),
    ],
)
def test_only_a_missing_package_is_called_missing(error: str, hint: str | None) -> None:
    found = hint_for(error, trains_recipe=False)
    assert found is None if hint is None else hint in str(found)


@pytest.mark.parametrize(
    "error",
    [
        "DataError: model.name_or_path: base lacks lm_head.weight of LlamaForCausalLM, which would start as random",
        "DataError: data.train: 2 rows are longer than data.max_length (64 tokens); raise data.max_length",
        "pandas.errors.DataError: No numeric types to aggregate",
    ],
)
def test_an_error_that_says_its_fix_gets_no_other(error: str) -> None:
    assert hint_for(error, trains_recipe=True) is None
