"""One thread per test process: tests start several ranks on few cores, and sums in one order repeat exactly."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch; ranks started by tests inherit it
