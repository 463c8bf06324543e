"""walbd: continuous backup of block devices."""

__version__ = "0.1.0"
