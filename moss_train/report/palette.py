"""Colours of the report. Silence, speech and revision differ in lightness too, so they survive grey printing."""

INK = "#1c2530"
MUTED = "#66727f"
GRID = "#e6eaee"
PAPER = "#ffffff"
ERROR = "#d62839"
USER = "#6c3fc4"

#: fill and text of a slot, by what stands in it
SLOT_COLOURS: dict[str, tuple[str, str]] = {
    "silence": ("#eef1f4", "#8a95a1"),
    "speak": ("#2f6fde", "#ffffff"),
    "revise": ("#f08a24", "#1c2530"),
    "unknown": ("#ffffff", "#a3adb8"),
}
KIND_COLOURS = {
    "text": "#2f6fde",
    "onset": "#12a37f",
    "idle_silence": "#a3adb8",
    "stop_silence": "#66727f",
    "revision": "#f08a24",
}
STAGE_COLOURS = ("#1c7c8c", "#7a4fbf", "#c2456b", "#9a7b16")

#: the page's colours by light and by dark, as CSS variables of these names
LIGHT: dict[str, str] = {
    "back": "#f5f7f9",
    "paper": PAPER,
    "ink": INK,
    "muted": "#5c6874",
    "grid": GRID,
    "good": "#0f7a56",
    "error": ERROR,
    "user": USER,
    "user-back": "#f3eefc",
    "silence": SLOT_COLOURS["silence"][0],
    "silence-ink": SLOT_COLOURS["silence"][1],
    "speak": SLOT_COLOURS["speak"][0],
    "speak-ink": SLOT_COLOURS["speak"][1],
    "revise": SLOT_COLOURS["revise"][0],
    "revise-ink": SLOT_COLOURS["revise"][1],
    "revise-text": "#a85407",
}
DARK: dict[str, str] = LIGHT | {
    "back": "#11161c",
    "paper": "#1a2129",
    "ink": "#e6ebf0",
    "muted": "#9ca8b4",
    "grid": "#2f3a45",
    "good": "#4cc38a",
    "error": "#ff6e7a",
    "user": "#b9a0f5",
    "user-back": "#2a2341",
    "silence": "#252e38",
    "silence-ink": "#7d8a97",
    "revise-text": "#f5a552",
}
