"""How messages become tokens, and how a conversation grows turn by turn."""
