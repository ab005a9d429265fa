"""What a run would take on devices that need not be here: memory, bytes on the wire, tokens a second, hours."""
