"""Networks from pixel space to logits: the literature's and the user's own."""
