"""Numbers as people read them."""

_SI = ("", "k", "M", "G", "T", "P")


def counted(number: float) -> str:
    """A count with its thousands set apart: 14,197,122."""
    return f"{number:,.0f}"


def short_number(number: float) -> str:
    """Three digits and a factor: 976, 1.31 k, 14.2 M."""
    power = 0
    while abs(number) >= 999.5 and power < len(_SI) - 1:
        number /= 1000
        power += 1
    return f"{number:.3g} {_SI[power]}".rstrip()


def byte_size(size_bytes: float) -> str:
    """A number of bytes with its unit, which goes by thousands: 512 B, 97.6 kB, 1.31 TB."""
    text = short_number(size_bytes)
    return f"{text}B" if " " in text else f"{text} B"
