"""Training on the CPU: blocks of the common architecture written out with a backward pass of their own."""
