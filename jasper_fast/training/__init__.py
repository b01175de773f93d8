"""Training: the loop, its stages, what a step computes, and the run that it belongs to."""
