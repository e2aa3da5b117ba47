"""Text from outside: names, captions, values and messages of others, which need not be valid Unicode."""


def encodable(text: str) -> str:
    """The text as one that UTF-8 can hold: what it cannot, lone surrogates, is U+FFFD.

    Every text from outside passes here once, where it enters, but for captions and the names by
    which a file is opened: those are bytes.
    """
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
