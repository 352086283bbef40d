"""Turn messages into tokens, and let a conversation grow turn by turn."""
