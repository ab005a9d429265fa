"""What needs text and changes weights before training: codes and scales chosen by what a layer sees, not by its weight alone."""
