"""Long runs: a seeded program that mixes all operations and faults, and checks every restore point.

    python -m tests.longrun --seed 1 --minutes 10
    python -m tests.longrun --mode kills --minutes 3

See docs/testing.md.
"""
