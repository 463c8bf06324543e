"""The checksum of the formats, as the specification reads."""


def checksum(data: bytes, salt: int = 0) -> int:
    """Salted sum of little-endian 32-bit words, negated; a short last word is extended with zeros."""
    data = bytes(data) + bytes(-len(data) % 4)
    total = salt
    for i in range(0, len(data), 4):
        total += int.from_bytes(data[i : i + 4], "little")
    return -total & 0xFFFFFFFF
