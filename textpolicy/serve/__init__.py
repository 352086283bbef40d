"""The Tinker API, and OpenAI's, over our own engine: ``textpolicy serve``."""
