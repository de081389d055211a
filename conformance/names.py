"""Resource names, each legal, that break careless code: reserved, escaped, composed and long ones."""

NASTY_NAMES = (
    "with space",
    " leading and trailing ",
    "question?mark",
    "semi;colon",
    "hash#sign",
    "percent%sign",
    "escaped%2Fslash",
    "double%252Fescape",
    "amper&sand",
    "plus+sign",
    "quote'\"s",
    "<angle>",
    "back\\slash",
    "colon:name",
    "star*pipe|",
    "~tilde",
    "@at",
    "[bracket]",
    ".hidden",
    "...",
    "caf\u00e9 composed",
    "cafe\u0301 decomposed",
    "\u65e5\u672c\u8a9e",
    "\U0001f600 emoji",
    "\u202eright to left",
    "a" * 255,
    "\u00e9" * 127 + "z",  # 255 bytes of UTF-8
)
"""Names that any server of files should take."""

CONTROL_NAMES = ("new\nline", "tab\there")
"""Names with control characters: taken and listed, or refused with 4xx, never a broken listing."""
