"""A program of its own: the bytes that onnxruntime adds to a fresh process to load and run one file.

python peak_memory.py FILE.onnx INPUTS.npz
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime

STATUS = Path("/proc/self/status")


def _resident(field: str) -> int | None:
    """Bytes of resident memory: now ("VmRSS"), or at the largest so far ("VmHWM").

    Linux says both. Elsewhere there is only the largest, which imports may have reached already; Linux's own
    count of that name includes the process that started this one. Windows has neither.
    """
    if STATUS.exists():
        found = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
        return 1024 * int(found.split()[1])
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Print the largest resident memory less what there was before the session was made, if known."""
    inputs = dict(np.load(sys.argv[2]))
    before = _resident("VmRSS")
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    session.run(None, inputs)
    largest = _resident("VmHWM")
    if before is not None and largest is not None:
        sys.stdout.write(f"{largest - before}\n")


if __name__ == "__main__":
    main()
