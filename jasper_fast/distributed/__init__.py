"""Several processes as one run: ranks, their collectives and the detection of lost processes."""
