"""What is run on an accelerator: floors to read a measurement by, checks, speeds, accuracies."""
