"""Train on the Tinker service: what it is sent, and the engine that sends it."""
