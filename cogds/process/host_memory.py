"""Host memory: what is available, and memory in whole pages that can be pinned.

A GPU copies from and to pinned memory asynchronously. torch's own allocator of pinned memory rounds every tensor up to
a power of two.
"""

import mmap
import re
import weakref
from pathlib import Path

import torch


class HostBuffer:
    """Host memory, unpinned when this object is garbage collected.

    num_bytes: rounded up to whole pages; bytes: uint8 [num_bytes]. Raises OSError if there is not enough memory.
    """

    def __init__(self, num_bytes: int):
        self.num_bytes = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = mmap.mmap(-1, self.num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_DONTFORK)  # forked data loaders never use it
        self.bytes = torch.frombuffer(pages, dtype=torch.uint8)

    def pin(self) -> None:
        """Pin all pages. Raises torch.cuda.CudaError if that is not possible."""
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), self.num_bytes, 0))
        # Memory must stay allocated while CUDA may use it. At the end of the process, the driver unpins it.
        weakref.finalize(self, _unpin, self.bytes.data_ptr()).atexit = False


def available_memory_bytes() -> int:
    """Return the memory available to new processes, limited by the control group. 0 if unknown."""
    try:
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return 0
    available = int(match.group(1)) * 1024 if match else 0
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            root = Path("/sys/fs/cgroup")
            available = min(available, int((root / limit).read_text()) - int((root / used).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return max(available, 0)


def _unpin(address: int) -> None:
    torch.cuda.synchronize()  # a copy may be in progress
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))
