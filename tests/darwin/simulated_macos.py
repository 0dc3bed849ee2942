"""Makes a Python process on Linux believe that it runs on macOS with Apple Silicon and Metal.

`environment.make_environment` installs this module into a virtual environment, where every Python process loads it
before anything else: child processes are simulated as well.

What is faked, after the documentation and the source of CPython 3.11 to 3.13 and MLX 0.32:

- `sys.platform`, the `platform` module and `os.uname` say macOS 15 on arm64.
- Functions and constants that macOS lacks are gone from `os`, `signal`, `resource`, `select`, `time`, `errno`, `fcntl`.
- /proc, /sys, /dev/shm and /dev/full do not exist for what goes through Python's own functions.
- `fcntl` has F_FULLFSYNC, which is carried out as a plain fsync, and F_GETPATH.
- The peak memory of a process, `ru_maxrss`, is in bytes.
- MLX's default device is a GPU, with the `device_info` and the wired limit of an M2 with 16 GB; Metal kernels raise.

What is no finding about macOS but comes from the simulation:

- Numbers, speed and memory are those of MLX on the CPU, to which streams of the GPU are mapped.
- Products with experts in 16 bits fail: MLX does not have them on the CPU.
- Models of mlx-lm that have Metal kernels are told that there is no Metal, and compute with MLX's operations.
- Nothing is compiled: on the CPU, `mx.compile` would start a C++ compiler for each shape. MLX_DISABLE_COMPILE is set.
- Metal's own failures (time limits, memory, the number of allocations) do not occur.
- File systems, signals, processes and the linker are those of Linux; `cblas_sgemm` is not found in the process, where
  Accelerate's would be.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# "Availability: Linux", "not macOS" or "FreeBSD" in CPython's documentation.
ABSENT = {
    "os": """
        sched_getaffinity sched_setaffinity sched_setscheduler sched_getscheduler sched_setparam sched_getparam
        sched_rr_get_interval posix_fadvise posix_fallocate fdatasync copy_file_range splice eventfd eventfd_read
        eventfd_write memfd_create pidfd_open getrandom setns unshare pipe2 setresuid setresgid getresuid getresgid
        getxattr setxattr listxattr removexattr waitid O_DIRECT O_TMPFILE O_PATH O_LARGEFILE O_NOATIME O_RSYNC
        POSIX_FADV_NORMAL POSIX_FADV_DONTNEED POSIX_FADV_SEQUENTIAL POSIX_FADV_RANDOM POSIX_FADV_WILLNEED
        POSIX_FADV_NOREUSE RWF_HIPRI RWF_NOWAIT MFD_CLOEXEC GRND_RANDOM GRND_NONBLOCK
    """,
    "signal": "sigtimedwait sigwaitinfo pidfd_send_signal SIGRTMIN SIGRTMAX SIGPWR SIGSTKFLT SIGPOLL SIGCLD",
    "resource": """
        prlimit RLIMIT_OFILE RLIMIT_RTPRIO RLIMIT_RTTIME RLIMIT_SIGPENDING RLIMIT_MSGQUEUE RLIMIT_NICE RUSAGE_THREAD
    """,
    "select": """
        epoll EPOLL_CLOEXEC EPOLLERR EPOLLET EPOLLEXCLUSIVE EPOLLHUP EPOLLIN EPOLLMSG EPOLLONESHOT EPOLLOUT EPOLLPRI
        EPOLLRDBAND EPOLLRDHUP EPOLLRDNORM EPOLLWRBAND EPOLLWRNORM
    """,
    "time": "CLOCK_BOOTTIME CLOCK_TAI",
    "errno": "EUCLEAN EREMOTEIO",
    "fcntl": """
        F_OFD_GETLK F_OFD_SETLK F_OFD_SETLKW F_ADD_SEALS F_GET_SEALS F_SEAL_SEAL F_SEAL_SHRINK F_SEAL_GROW F_SEAL_WRITE
        F_NOTIFY F_SETLEASE F_GETLEASE F_SETPIPE_SZ F_GETPIPE_SZ DN_ACCESS DN_ATTRIB DN_CREATE DN_DELETE DN_MODIFY
        DN_MULTISHOT DN_RENAME
    """,
}
HIDDEN = ("/proc", "/sys", "/dev/shm", "/dev/full", "/etc/os-release")
GB = 1 << 30
DEVICE = {
    "device_name": "Apple M2",
    "architecture": "applegpu_g14g",
    "max_buffer_length": 9 * GB,
    "max_recommended_working_set_size": 11 * GB,
    "memory_size": 16 * GB,
    "resource_limit": 499000,
}
"""What `mx.device_info()` tells of an M2 with 16 GB (mlx/backend/metal/device_info.cpp)."""


def start() -> None:
    """Turn this process into a simulated one."""
    if sys.platform == "darwin":  # Python reads .pth files twice where lib64 is a link to lib
        return
    os.environ["MLX_DISABLE_COMPILE"] = "1"
    _fake_platform()
    _fake_fcntl()
    for module, names in ABSENT.items():
        _remove(module, names.split())
    _count_memory_in_bytes()
    _hide_files()
    sys.meta_path.insert(0, _FakeGpuOnImport())


def _fake_platform() -> None:
    # The name that `sysconfig` would look for is made of sys.platform.
    multiarch = getattr(sys.implementation, "_multiarch", "")
    os.environ.setdefault("_PYTHON_SYSCONFIGDATA_NAME", f"_sysconfigdata_{sys.abiflags}_{sys.platform}_{multiarch}")
    sys.platform = "darwin"
    system = os.uname_result(("Darwin", os.uname().nodename, "24.5.0", "Darwin Kernel Version 24.5.0", "arm64"))
    os.uname = lambda: system
    import platform

    platform.mac_ver = lambda *_, **__: ("15.5", ("", "", ""), "arm64")
    platform.libc_ver = lambda *_, **__: ("", "")
    platform.processor = lambda: "arm"
    proxies = ModuleType("_scproxy")  # urllib.request imports it on macOS
    proxies._get_proxy_settings, proxies._get_proxies = dict, dict
    sys.modules["_scproxy"] = proxies
    trust = ModuleType("truststore._macos")  # pip's copy loads Security.framework
    trust._configure_context = trust._verify_peercerts_impl = None
    sys.modules["truststore._macos"] = trust


def _remove(module: str, names: Sequence[str]) -> None:
    imported = __import__(module)
    for place in (imported, sys.modules["posix"]) if module == "os" else (imported,):
        for name in names:
            if hasattr(place, name):
                delattr(place, name)


def _fake_fcntl() -> None:
    import fcntl

    fcntl.F_FULLFSYNC, fcntl.F_GETPATH, fcntl.F_NOCACHE = 51, 50, 48
    own, fsync, readlink = fcntl.fcntl, os.fsync, os.readlink

    def call(handle: Any, command: int, argument: Any = 0) -> Any:
        number = handle if isinstance(handle, int) else handle.fileno()
        if command == fcntl.F_FULLFSYNC:
            fsync(number)
            return 0
        if command == fcntl.F_GETPATH:
            return os.fsencode(readlink(f"/proc/self/fd/{number}")).ljust(1024, b"\0")
        return own(handle, command, argument)

    fcntl.fcntl = call


def _count_memory_in_bytes() -> None:
    import resource

    def in_bytes(usage: resource.struct_rusage) -> resource.struct_rusage:
        return resource.struct_rusage((*usage[:2], usage.ru_maxrss * 1024, *usage[3:]))

    getrusage, wait4 = resource.getrusage, os.wait4

    def wait4_in_bytes(pid: int, options: int) -> tuple[int, int, resource.struct_rusage]:
        pid, status, usage = wait4(pid, options)
        return pid, status, in_bytes(usage)

    resource.getrusage = lambda who: in_bytes(getrusage(who))
    os.wait4 = wait4_in_bytes


def _hide_files() -> None:
    import _io
    import builtins
    import errno
    import io

    def is_hidden(path: Any) -> bool:
        try:
            path = os.fsdecode(path)
        except TypeError:
            return False
        return any(path == hidden or path.startswith(f"{hidden}/") for hidden in HIDDEN)

    def without_hidden(own: Callable) -> Callable:
        @wraps(own)
        def call(path: Any = ".", *arguments: Any, **named: Any) -> Any:
            if is_hidden(path):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            return own(path, *arguments, **named)

        return call

    supported = (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks, os.supports_effective_ids)
    for name in ("open", "stat", "lstat", "listdir", "scandir", "readlink", "access"):
        own = getattr(os, name)
        replaced = without_hidden(own)
        for functions in supported:
            if own in functions:
                functions.add(replaced)
        setattr(os, name, replaced)
    # A function is pickled by the name under which its module, _io, holds it.
    io.open = builtins.open = _io.open = without_hidden(io.open)


class _FakeGpuOnImport:
    """A finder of modules that finds mlx.core alone, and changes it once it is loaded."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "mlx.core" or (spec := PathFinder.find_spec(name, path)) is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            _fake_gpu(module)

        spec.loader.exec_module = exec_module
        return spec


def _fake_gpu(mx: ModuleType) -> None:
    device, wired = mx.Device(mx.gpu, 0), 0

    def default_device() -> Any:
        return device

    def set_default_device(chosen: Any) -> None:
        nonlocal device
        device = chosen if isinstance(chosen, mx.Device) else mx.Device(chosen, 0)

    def device_info(*_: Any, **__: Any) -> dict[str, Any]:
        on_gpu = device.type == mx.DeviceType.gpu
        return dict(DEVICE) if on_gpu else {"device_name": "Apple M2", "architecture": "arm64"}

    def set_wired_limit(limit: int) -> int:
        nonlocal wired
        if limit > DEVICE["max_recommended_working_set_size"]:
            raise ValueError("[metal::set_wired_limit] Setting a wired limit larger than the maximum is not allowed.")
        wired, before = limit, wired
        return before

    def metal_is_available() -> bool:
        return not sys._getframe(1).f_globals.get("__name__", "").startswith("mlx_lm.models")

    def metal_kernel(name: str, *_: Any, **__: Any) -> Callable:
        def run(*_: Any, **__: Any) -> None:
            raise RuntimeError(f"the Metal kernel {name} cannot run in the simulated macOS")

        return run

    def on_cpu(own: Callable) -> Callable:
        def call(where: Any = None, *arguments: Any, **named: Any) -> Any:
            if isinstance(where, mx.DeviceType):
                where = mx.cpu
            elif isinstance(where, mx.Device):
                where = mx.Device(mx.cpu, 0)
            return own(where, *arguments, **named)

        return call

    mx.default_device, mx.set_default_device = default_device, set_default_device
    mx.device_info = mx.metal.device_info = device_info
    mx.is_available = lambda *_: True
    mx.metal.is_available = metal_is_available
    mx.set_wired_limit = set_wired_limit
    mx.fast.metal_kernel = metal_kernel
    for name in ("new_thread_local_stream", "new_stream", "new_thread_unsafe_stream", "default_stream", "stream"):
        if hasattr(mx, name):
            setattr(mx, name, on_cpu(getattr(mx, name)))
