"""Image sets as tensors, by name or from the user's files."""
