"""The one exception that a user can act on."""


class UserError(Exception):
    """Something the user can fix: the message names the file, line, flag or tensor, and what to do.

    `launch` prints it as one line, without a traceback.
    """

    def __str__(self):
        """The message with unprintable characters escaped: text from a file could otherwise add
        lines or control the terminal."""
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())
