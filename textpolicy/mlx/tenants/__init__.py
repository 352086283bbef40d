"""The model that a server serves: one base in this process, with any number of adapters on it."""
