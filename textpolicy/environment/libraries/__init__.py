"""The environments of other libraries: Gymnasium, reasoning-gym, verifiers and any OpenAI-style client."""
