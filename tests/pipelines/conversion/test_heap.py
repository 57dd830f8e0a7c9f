import subprocess
import sys

from tests.places import ROOT

SCRIPT = """
import resource
import numpy as np
from pipelines.conversion.heap import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [np.ones(size << 17) for size in (4, 7, 9, 16)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
keep_freed_memory()
faults()
print(before, faults())
"""


def test_freed_memory_is_used_again_without_asking_for_it() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 10_000 and after < 100
