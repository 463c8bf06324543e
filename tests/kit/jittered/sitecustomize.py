"""Found by every Python process that a jittered test starts: see tests/kit/jitter.py."""

import os
import sys

if sys.argv != ["-c"] and (seed := os.environ.get("WALBD_TEST_JITTER")):
    from tests.kit.jitter import install

    install(seed)
