"""The acceptance run on a GPU, and the model that predicts its figures."""
