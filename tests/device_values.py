"""A device whose kernels are interpreted, and whose arrays refuse those of the host.

The kernels run in the PTX interpreter, so values are right. Arrays on the device are
`DeviceArray`s: an operation with an array of the host raises, as it does in CuPy, and a
result that stays on the host is not a `DeviceArray`.
"""

import device_array
import ptx
from device_array import DeviceArray
from seam import cuda


def install(monkeypatch):
    """Replace the device until the test ends; return the list of the host's reads."""
    ptx.install(monkeypatch)
    # The names are replaced below, so keep the functions of `ptx.install`.
    empty, convert = cuda.empty, cuda._to_numpy_or_cupy
    settings = {
        "empty": lambda shape, dtype: empty(shape, dtype).view(DeviceArray),
        "to_device": device_array.to_device,
        "to_host": device_array.to_host,
        # Only arrays of the device count; `ptx.install` takes all of them.
        "is_cuda": lambda x: isinstance(x, DeviceArray),
        "_to_numpy_or_cupy": lambda name, x: convert(name, x).view(DeviceArray),
        # Results stay arrays of the device, so that a test can see where they are.
        "_convert_back_to": lambda like: lambda x: x,
    }
    for name, function in settings.items():
        monkeypatch.setattr(cuda, name, function)
    # Reads of earlier tests do not count.
    device_array.READS.clear()
    return device_array.READS
