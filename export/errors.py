"""What the command says in one sentence instead of a traceback."""


class ExportError(ValueError):
    """Something that cannot be exported as asked; the message is for the person who asked."""


class ParityError(ExportError):
    """The written graph and PyTorch disagree by more than the stated tolerance."""
