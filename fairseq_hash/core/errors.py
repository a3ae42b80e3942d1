"""The one error a user can mend: raised with one line that says what was given, what is allowed and what to do."""

LONGEST = 2000  # characters of a message; what stands in a damaged file may have millions


class UserError(ValueError):
    """Bad input. The message is one line and complete: commands show it alone, without a traceback.

    It may quote a file, which may hold anything: what a terminal cannot show or would obey becomes `?`, and a message
    that is too long loses its middle.
    """

    def __init__(self, message: str) -> None:
        line = "".join(sign if sign.isprintable() else "?" for sign in " ".join(message.split()))
        half = LONGEST // 2 - 3
        super().__init__(line if len(line) <= LONGEST else f"{line[:half]} ... {line[-half:]}")
