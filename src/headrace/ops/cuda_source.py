"""CUDA C++ beside Triton: a .cu file compiled by NVRTC, kept on disk, launched on torch's stream.

For what Triton has no words for, such as thread block clusters. torch's CUDA wheels bring
cuda.bindings; where it is missing, ops keep to their Triton kernels.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from triton.runtime.cache import get_cache_manager

log = logging.getLogger(__name__)


@cache
def available() -> bool:
    """Whether NVRTC and the driver can be called from here; if not, the log says why, once."""
    try:
        from cuda.bindings import driver, nvrtc

        driver.cuDriverGetVersion()
        nvrtc.nvrtcVersion()
    except Exception as error:  # cuda.bindings has errors of its own for libraries it can't find
        log.warning("no CUDA C++ kernels, only Triton's: %s", error)
        return False
    return True


def compile_source(source: Path, arch: str, defines: Mapping[str, int]) -> bytes:
    """The cubin of a .cu file for such as "sm_90", kept where Triton keeps its own.

    Raises RuntimeError with the compiler's messages.
    """
    from cuda.bindings import nvrtc

    text = source.read_bytes()
    options = [f"--gpu-architecture={arch}", *(f"-D{name}={n}" for name, n in defines.items())]
    key = repr((text, options, nvrtc.nvrtcVersion()))
    kept = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    name = f"{source.stem}.cubin"
    if path := kept.get_file(name):
        return Path(path).read_bytes()
    cubin = _compile(text, source.name, options)
    kept.put(cubin, name, binary=True)
    return cubin


def _compile(text: bytes, name: str, options: list[str]) -> bytes:
    from cuda.bindings import nvrtc

    program = _checked(nvrtc.nvrtcCreateProgram(text, name.encode(), 0, [], []))
    try:
        (failed,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        if int(failed):
            messages = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
            _checked(nvrtc.nvrtcGetProgramLog(program, messages))
            raise RuntimeError(f"{name} does not compile:\n{messages.rstrip(bytes(1)).decode()}")
        cubin = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
        return bytes(cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


class CudaKernel:
    """One kernel on one GPU. Its clusters lie along the grid's first axis.

    It may start before the kernel before it has ended (programmatic dependent launch), and must
    wait for that itself.
    """

    def __init__(
        self,
        source: Path,
        name: str,
        device: int,
        num_threads: int,
        cluster: int,  # programs, 8 at most
        shared_bytes: int,
        defines: Mapping[str, int],
    ) -> None:
        from cuda.bindings import driver

        major, minor = torch.cuda.get_device_capability(device)
        cubin = compile_source(source, f"sm_{major}{minor}", defines)
        _need_context(device)
        self._module = _checked(driver.cuModuleLoadData(cubin))
        self._function = _checked(driver.cuModuleGetFunction(self._module, name.encode()))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(self._function, limit, shared_bytes))
        self._device, self._cluster = device, cluster
        self._num_threads, self._shared_bytes = num_threads, shared_bytes
        self._configs: dict[tuple[int, int, int], Any] = {}

    def launch(self, grid: tuple[int, int], arguments: ctypes.Structure) -> None:
        """Launch on the current stream; `arguments` is the kernel's one parameter."""
        from cuda.bindings import driver

        key = (*grid, torch.cuda.current_stream(self._device).cuda_stream)
        if key not in self._configs:
            self._configs[key] = self._config(*key)
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        address = ctypes.addressof(parameters)
        _checked(driver.cuLaunchKernelEx(self._configs[key], self._function, address, 0))

    def _config(self, columns: int, rows: int, stream: int) -> Any:
        from cuda.bindings import driver

        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = columns, rows, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self._num_threads, 1, 1
        config.sharedMemBytes, config.hStream = self._shared_bytes, driver.CUstream(stream)
        ids = driver.CUlaunchAttributeID
        cluster, early = driver.CUlaunchAttribute(), driver.CUlaunchAttribute()
        cluster.id = ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size = cluster.value.clusterDim
        size.x, size.y, size.z = self._cluster, 1, 1
        early.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [cluster, early], 2
        return config


def _need_context(device: int) -> None:
    """Give this thread the GPU's context, which torch does only when it computes something."""
    from cuda.bindings import driver

    if not int(_checked(driver.cuCtxGetCurrent())):
        context = _checked(driver.cuDevicePrimaryCtxRetain(_checked(driver.cuDeviceGet(device))))
        _checked(driver.cuCtxSetCurrent(context))


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call of cuda.bindings returned beside its error; RuntimeError if it failed."""
    error, *values = result
    if int(error):
        raise RuntimeError(f"CUDA: {error!r}")
    return values[0] if values else None
