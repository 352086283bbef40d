"""The pages that people read about runs: an HTML file, and a local page in ``view``."""
