"""The class of errors that the user of a command can put right."""


class UserError(Exception):
    """A mistake of the user's. The message is for people: it names what is wrong and what to do.

    A command prints the message in one line and ends with exit status 2; see ``clear_errors``.
    """
