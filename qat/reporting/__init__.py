"""What a run says of itself: its result, the table at its end, the estimate before it."""
