"""What of a finished training is handed on: whose weights are packed, and where they are published."""
