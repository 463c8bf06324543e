"""The type of every buffer that crosses into the extensions."""

Buf = bytes | bytearray | memoryview
