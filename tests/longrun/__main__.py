"""The command line of long runs."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import traceback
from pathlib import Path

from tests.longrun.kills import run_kills
from tests.longrun.mixed import MixedRun


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.longrun", description=__doc__)
    parser.add_argument("--mode", choices=["mixed", "doctor", "kills"], default="mixed")
    parser.add_argument("--seed", type=int, help="which sequence of operations; default: a random one")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--keep", action="store_true", help="keep the directory")
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 32)
    root = Path(tempfile.mkdtemp(prefix="walbd-longrun-"))
    print(f"{args.mode}, seed {seed}, {args.minutes:g} minutes, in {root}", flush=True)
    try:
        if args.mode == "kills":
            run_kills(root, seed=seed, seconds=args.minutes * 60)
        else:
            MixedRun(root, seed, by_doctor=args.mode == "doctor").run(args.minutes * 60)
    except Exception:
        traceback.print_exc()
        print(f"FAILED: seed {seed}; logs and data are in {root}")
        return 1
    print(f"ok: seed {seed}")
    if not args.keep:
        remove(root)
    return 0


def remove(root: Path) -> None:
    """Remove a directory that tests have made."""
    import shutil

    shutil.rmtree(root)


if __name__ == "__main__":
    sys.exit(main())
