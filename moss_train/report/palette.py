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
STAGE_COLOURS = ("#1c7c8c", "#7a4fbf", "#c2456b", "#2b3a4a")
