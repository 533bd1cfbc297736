"""Units of numbers: which ones are usual, and which of them are the same."""

import re

PREFIXES = {"": "", "kilo": "k", "centi": "c", "milli": "m", "micro": "μ", "nano": "n", "mega": "M", "giga": "G"}
BASES = {"meter": "m", "metre": "m", "gram": "g", "liter": "l", "litre": "l", "second": "s", "watt": "W", "volt": "V",
         "hertz": "Hz", "newton": "N", "pascal": "Pa", "joule": "J"}  # fmt: skip
SYMBOLS = {prefix + base: sign + symbol for prefix, sign in PREFIXES.items() for base, symbol in BASES.items()}
SYMBOLS |= {"sec": "s", "minute": "min", "hour": "h", "hr": "h", "pound": "lb", "ounce": "oz", "mile": "mi",
            "inch": "in", "inche": "in", "foot": "ft", "feet": "ft", "yard": "yd", "degree": "°", "yr": "year",
            "wk": "week", "mo": "month", "ug": "μg", "um": "μm", "kmh": "km/h", "kph": "km/h", "ohm": "Ω"}  # fmt: skip
"""Word for a unit, without a plural's s -> its symbol."""
CASED = {"mw", "mv", "mm", "mj", "mpa", "mhz", "kb", "mb", "gb", "tb", "m"}
"""Units, in lower case, that mean something else in upper case: mW and MW, Mb and MB, m (metres) and M (millions)."""
UNIT = re.compile(
    r"\d\s?(%|km/h|m/s|°\s?[cf]?|[kmµμn]?m[²³23]?|[kmµμu]?g|[mcdµμu]?l|[kmg]?w|[km]?v|[kmgt]b|[kmg]?hz|lbs?|oz|ft|yd|mi|k|s|ms|min|h|hrs?"
    r"|cm[²³23]?|dm[²³23]?|kmh|mph|am|pm|[kmg]n|[kmg]j|[kmgh]?pa|[km]?bar|k?cal|m?mol|[kmgt]wh|m?ah|ma|[km]?ω|ohms?|kph"
    r"|(?:kilo|milli|centi|micro|mega|giga)?"
    r"(?:gram|met(?:er|re)|lit(?:er|re)|watt|hertz|byte|volt|newton|pascal|joule)s?"
    r"|(?:second|minute|hour|day|week|month|year)s?|yrs?|wks?|mos?)(?!\w)"
)
"""Unit after a digit, in lower case."""
CURRENCY = re.compile(r"[$€£¥₹]")


def fold_unit(unit: str) -> str:
    """Return a unit in the form in which equal ones are equal: by its symbol, in lower case where case does not count.

    5 kilometers is 5 km, and 5 MW is not 5 mW.
    """
    single = unit[:-1] if unit[-1:] in ("s", "S") and len(unit) > 2 else unit
    unit = SYMBOLS.get(single.casefold()) or (single if is_unit(single) else unit)
    return unit if unit.casefold() in CASED else unit.casefold()


def is_unit(unit: str) -> bool:
    """Tell whether a text is a usual unit."""
    return UNIT.fullmatch(f"1{unit.casefold()}") is not None
