"""What decoding and scoring share: prompts read once, as a tree, into caches of bounded sizes."""
