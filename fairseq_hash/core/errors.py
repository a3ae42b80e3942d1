"""The one error a user can mend: raised with one line that says what was given, what is allowed and what to do."""


class UserError(ValueError):
    """Bad input. The message is one line and complete: commands show it alone, without a traceback."""
