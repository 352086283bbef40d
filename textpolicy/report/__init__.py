"""What a person reads about runs: an HTML file, and a local page in ``view``."""
