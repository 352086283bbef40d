"""The smallest tokenizers: nothing but encode and decode, without a chat template or a stop token."""


class Letters:
    """One id per character."""

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


class Numbers:
    """A text is its ids, with spaces between them."""

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))
