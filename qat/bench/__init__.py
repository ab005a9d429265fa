"""Linear layers and training steps timed beside their peers, with the machine's limits: `python -m qat.bench`."""
