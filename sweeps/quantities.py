"""Counts, sizes and durations in words, for the terminal.

Map: `format_count`, `format_bytes`, `format_clock` (a display that runs), `format_duration` (a
sentence).
"""


def format_count(count: int, plural: str) -> str:
    """Return a number of things, in the singular if it is 1.

    Examples
    --------
    >>> format_count(1, "trials"), format_count(2050, "epochs")
    ('1 trial', '2,050 epochs')
    """
    return f"{count:,} {plural.removesuffix('s') if count == 1 else plural}"


def format_bytes(count: float) -> str:
    """Return a number of bytes in MB, or from one GB in GB.

    Examples
    --------
    >>> format_bytes(317_640), format_bytes(4.72e9)
    ('0.3 MB', '4.72 GB')
    """
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def format_clock(seconds: float) -> str:
    """Return a duration as minutes and seconds, or hours and minutes.

    Examples
    --------
    >>> format_clock(75), format_clock(7500)
    ('1:15', '2 h 05')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d}"


def format_duration(seconds: float) -> str:
    """Return a duration in seconds, minutes, or hours and minutes.

    Examples
    --------
    >>> format_duration(42), format_duration(3723)
    ('42 s', '1 h 02 min')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
