"""Makes sure that there is room on a disk before HDF5 needs it.

HDF5 2.0 does not survive a disk that is full: having failed to write what it caches, it crashes
when the file is closed.
"""

import ctypes
import errno
import os
import resource

_KEEP_SIZE = 1
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def reserve(descriptor: int, size: int) -> None:
    """Reserve room behind the end of a file, whose length stays as it is.

    Where the file system cannot do that, what is free is looked up, which is less certain.

    Parameters
    ----------
    descriptor
        Of the file, open for writing.
    size
        In bytes.

    Raises
    ------
    OSError
        There is not as much room.
    """
    end = os.fstat(descriptor).st_size
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and end + size > limit:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    code = _allocate(descriptor, end, size)
    if code and code not in _FULL:
        free = os.fstatvfs(descriptor)
        code = errno.ENOSPC if free.f_bavail * free.f_frsize < size else 0
    if code:
        raise OSError(code, os.strerror(code))


def _allocate(descriptor: int, start: int, size: int) -> int:
    """Call fallocate(2), which Python lacks; return the number of its error, or 0."""
    try:
        allocate = ctypes.CDLL(None, use_errno=True).fallocate64
    except (AttributeError, OSError):  # no Linux
        return errno.EOPNOTSUPP
    allocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return ctypes.get_errno() if allocate(descriptor, _KEEP_SIZE, start, size) else 0


def release(descriptor: int) -> None:
    """Give back what is reserved behind the end of a file."""
    os.ftruncate(descriptor, os.fstat(descriptor).st_size)
