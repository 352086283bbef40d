"""The part that decoding and scoring share: prompts read once, as a tree, into forkable contexts of bounded sizes."""
