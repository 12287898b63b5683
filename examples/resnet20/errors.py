"""What only the user can put right."""


class UserError(Exception):
    """One line that says what is wrong and what to do; the program ends with exit code 2."""
