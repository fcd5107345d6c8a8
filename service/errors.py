"""The one exception for a request or an input file that is at fault, with the code that tells why."""


class InputError(Exception):
    """What the caller sent cannot be used.

    `code` is a stable word for programs (`truncated`, `unknown_option`, ...), `message` one sentence for people.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
