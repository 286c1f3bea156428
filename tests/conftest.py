"""Set before torch is imported: waiting threads must not spin.

With another process on the same cores, spinning made the tiny models of the tests up to 17 times slower.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
