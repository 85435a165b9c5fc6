"""CUDA C++ is compiled without a GPU, where NVRTC is."""

from __future__ import annotations

import sys

import pytest

from headrace.ops import cuda_source
from headrace.ops.cuda_source import compile_source


def need_nvrtc() -> None:
    """Skip where there is none."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="not on this system")
    try:
        nvrtc.nvrtcVersion()
    except Exception as error:
        pytest.skip(f"no NVRTC: {error}")


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A kernel that stores N, which somebody must define; nothing is kept on disk yet."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "store.cu"
    path.write_text('extern "C" __global__ void store(int *p) { *p = N; }\n')
    return path


def test_a_kernel_is_compiled_once(source, monkeypatch):
    need_nvrtc()
    cubin = compile_source(source, "sm_90", {"N": 1})
    assert cubin[:4] == b"\x7fELF"
    assert compile_source(source, "sm_90", {"N": 2}) != cubin
    with monkeypatch.context() as patch:
        patch.setattr(cuda_source, "_compile", None)  # must not be called
        assert compile_source(source, "sm_90", {"N": 1}) == cubin
    source.write_text(source.read_text().replace("store", "write"))
    assert compile_source(source, "sm_90", {"N": 1}) != cubin


def test_the_compilers_message_is_told(source):
    need_nvrtc()
    with pytest.raises(RuntimeError, match=r'store.cu does not compile:\n(.|\n)*"N" is undefined'):
        compile_source(source, "sm_90", {})


def test_without_bindings_there_is_one_line_in_the_log(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    cuda_source.available.cache_clear()
    try:
        assert [cuda_source.available() for _ in range(3)] == [False] * 3
    finally:
        cuda_source.available.cache_clear()
    (record,) = caplog.records
    assert "only Triton's" in record.message


def test_a_failed_call_is_told():
    assert cuda_source._checked((0, 7)) == 7
    assert cuda_source._checked((0,)) is None
    with pytest.raises(RuntimeError, match="CUDA: 201"):
        cuda_source._checked((201, 7))
