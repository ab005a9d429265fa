"""What a person sees while something long is done; the results themselves are printed by whoever has them."""
