"""A model's continuation of a prompt: what is asked, token by token, and what it cost."""
