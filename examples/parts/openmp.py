"""Imported before torch: threads of a CPU that wait for each other soon give their core up.

By default they spin for millions of rounds. Beside other work a training step then takes up to 80
times as long (0.05 steps a second instead of 4, on two cores beside four other jobs), for a thread
that spins holds the core which the one it waits for needs. On a quiet CPU it costs 3 % at most.
"""

import os

# torch's OpenMP reads it once, as it is loaded; a user's own choice stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
