"""Copy bandwidth as the machine's limits have it, beside numpy's and a plain loop in C: they agree within 10 %.

Says something on a quiet machine only; three copies in turns, so that what disturbs one disturbs all.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from effbench.report.machine import beside_numpy

SIZE = 2**28
STREAM = """
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + 1e-9 * t.tv_nsec; }
int main(int argc, char **argv) {
  size_t n = atol(argv[1]) / sizeof(double);
  double *a = aligned_alloc(4096, n * sizeof *a), *b = aligned_alloc(4096, n * sizeof *b), best = 1e9;
  for (size_t i = 0; i < n; i++) { a[i] = 1; b[i] = 0; }
  for (int k = 0; k < 15; k++) {
    double start = now();
    for (size_t i = 0; i < n; i++) b[i] = a[i];
    double end = now();
    __asm__ volatile("" ::"r"(b) : "memory");
    if (end - start < best) best = end - start;
  }
  printf("%f", 2.0 * n * sizeof *a / best);
  return 0;
}
"""


def test_copy_bandwidth_beside_numpy() -> None:
    ours, theirs = beside_numpy(SIZE)
    assert ours == pytest.approx(theirs, rel=0.1)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
def test_copy_bandwidth_beside_a_loop_in_c(tmp_path: Path) -> None:
    (tmp_path / "stream.c").write_text(STREAM)
    subprocess.run(["gcc", "-O3", "-march=native", "-o", tmp_path / "stream", tmp_path / "stream.c"], check=True)
    theirs = float(subprocess.run([tmp_path / "stream", str(SIZE)], capture_output=True, check=True).stdout)
    ours, _ = beside_numpy(SIZE)
    assert ours == pytest.approx(theirs, rel=0.1)
