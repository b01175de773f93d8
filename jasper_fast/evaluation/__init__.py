"""Scores of models and embeddings."""
