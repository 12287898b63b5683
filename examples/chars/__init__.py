"""The parts of the character transformer example, one idea a file."""
