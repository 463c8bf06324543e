"""The type of every buffer that crosses into the extensions.

One that holds an array of structs (src/*.h) must be whole and aligned to 8 bytes, as new bytes are: otherwise
ValueError.
"""

Buf = bytes | bytearray | memoryview
