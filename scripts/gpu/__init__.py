"""Scripts for accelerators: lower bounds on the time of a step, checks, speeds and accuracies."""
