"""The look of figures and pages: each is drawn for light and for dark screens."""

from dataclasses import dataclass

# The order of Okabe and Ito's colours, each dark enough to be read as text on white (WCAG: 4.5 to 1); dashes or markers
# differ as well, because nobody can tell nine such colours apart reliably.
COLOURS = ("#0072B2", "#C24E00", "#007F5C", "#B5478B", "#8A6200", "#6B5BD2", "#882255", "#6B7000", "#332288")
DPI = 144


@dataclass(frozen=True)
class Theme:
    """Colours of paper and ink, the neutral colour of the dense model, and how much lighter the palette is."""

    paper: str
    ink: str
    faint: str
    neutral: str
    lighten: float

    def colour(self, number: "int | None") -> str:
        """Return a colour of the palette, which goes round, as `#rrggbb`; the neutral one for None."""
        if number is None:
            return self.neutral
        channels = bytes.fromhex(COLOURS[number % len(COLOURS)][1:])
        return "#" + bytes(round(channel + (255 - channel) * self.lighten) for channel in channels).hex()


LIGHT = Theme(paper="#ffffff", ink="#1c2024", faint="#d5d9de", neutral="#5b6570", lighten=0.0)
DARK = Theme(paper="#15181c", ink="#e4e7eb", faint="#3a4149", neutral="#a4adb8", lighten=0.45)
