"""One colour per sampler for every figure of the project, tabular and language model alike.

The colours are Okabe and Ito's colour-blind-safe set; methods that are the same idea in the two settings share one.
No imports of weight, so that any script can use it.
"""

import colorsys
import zlib

_VERMILION, _BLUE, _GREEN, _ORANGE = "#D55E00", "#0072B2", "#009E73", "#E69F00"
_PURPLE, _SKY, _BLACK, _GREY = "#CC79A7", "#56B4E9", "#000000", "#7F7F7F"
_BROWN, _OLIVE, _INDIGO, _TEAL = "#8C510A", "#808000", "#332288", "#44AA99"

COLORS = {
    "DPO-Unif": _VERMILION,
    "DPO-Mix-R": _BLUE,
    "DPO-Mix-P": _GREEN,
    "DPO-Mix-P*": _ORANGE,
    "DPO-Mix-R-1": _GREY,
    "DPO-Mix-R-2": _SKY,
    "DPO-Mix-P-1": _BLACK,
    "DPO-Mix-P-2": _TEAL,
    "DPO-Opt-Unif": _BROWN,
    "DPO-Policy-Unif": _OLIVE,
    "DPO-Policy-Policy": _INDIGO,
    "offline": _VERMILION,
    "online": _BLUE,
    "gshf": _ORANGE,
    "mixp": _GREEN,
    "mixp-iterative": _TEAL,
    "pilaf": _PURPLE,
    "simplemix": _SKY,
    "xpo": _BROWN,
    "history": _OLIVE,
    "best-worst": _BLACK,
    "implicit-best-worst": _GREY,
    "random-pairs": _INDIGO,
    "theory": "#882255",
    "theory-mix": "#AA4499",
    "nash-md": "#0077BB",
    "best-sweet": "#66CCEE",
    "d-optimal": "#117733",
    "g-optimal": "#CC6677",
    "v-optimal": "#DDCC77",
    "g-hybrid": "#AA4400",
}

# A second sign beside the colour, for figures of many samplers.
_MARKERS = "osD^vPX<>p*hd"


def color_of(name: str) -> str:
    """Hex colour of a sampler; a name outside the table gets one that depends on nothing but the name."""
    if name in COLORS:
        return COLORS[name]
    hue = zlib.crc32(name.encode()) / 2**32
    red, green, blue = colorsys.hls_to_rgb(hue, 0.4, 0.6)
    return f"#{round(255 * red):02X}{round(255 * green):02X}{round(255 * blue):02X}"


def marker_of(name: str) -> str:
    """Matplotlib marker of a sampler; rows of COLORS that follow each other have different ones."""
    place = list(COLORS).index(name) if name in COLORS else zlib.crc32(name.encode())
    return _MARKERS[place % len(_MARKERS)]


def line_of(name: str) -> str:
    """Line style in figures that hold both kinds: dashed for the tabular samplers, some of which share a colour."""
    return "--" if name.startswith("DPO-") else "-"
