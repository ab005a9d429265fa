"""lightning callbacks that look at a training and change nothing: what they find goes into the step's row and the run's files."""
