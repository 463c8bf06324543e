"""ext.checksum against its twin."""

from hypothesis import given
from hypothesis import strategies as st

from tests.reference import checksum as reference
from walbd.ext.checksum import checksum, is_zero

U32 = st.integers(0, 2**32 - 1)


@given(st.binary(max_size=2000), U32)
def test_checksum_equals_reference(data: bytes, salt: int) -> None:
    assert checksum(data, salt) == reference.checksum(data, salt)


def test_checksum_of_nothing() -> None:
    assert checksum(b"") == 0


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_is_zero_sees_every_byte(size: int, at: int) -> None:
    data = bytearray(size)
    assert is_zero(data)
    if at < size:
        data[at] = 1
        assert not is_zero(data)
