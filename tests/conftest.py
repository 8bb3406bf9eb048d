"""What every test run needs before torch is imported."""

import os

# Threads that wait for work must sleep, not spin: on two cores shared with a server a spinning pool makes torch ten times
# slower (docs/performance.md). The server's own process sets it for itself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
