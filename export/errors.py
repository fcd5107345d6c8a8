"""What the command says in one sentence instead of a traceback."""


class ExportError(ValueError):
    """Something that cannot be exported as asked; the message is for the person who asked."""


class ParityError(ExportError):
    """Two forms of one network disagree by more than the stated tolerance; no file is written."""
