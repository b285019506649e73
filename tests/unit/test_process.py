import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from shear_tron.parallel.process import prepare
prepare(torch.device("{device}"))
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**26)  # 256 MB, and freed
before = faults()
torch.ones(2**26)
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_on_a_cpu_the_memory_of_a_freed_tensor_is_used_again() -> None:
    def found(device: str) -> int:
        command = [sys.executable, "-c", FAULTS.format(device=device)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert found("cpu") < 100
    assert found("cuda") > 10_000  # which has an allocator of its own: pages are cleared again
