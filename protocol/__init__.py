"""Frames, messages and conversations: bytes in, messages out. No IO in this package."""
