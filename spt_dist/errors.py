"""The exceptions that mean "the user can mend this"."""


class UserError(ValueError):
    """A mistake in what the user gave: a config key, a file, a budget, a name.

    The message is one line that names the thing, shows its value and says what to do.
    The scripts in ``launch/`` print it without a traceback and exit with status 2.
    """
