"""What a model is worth: retrieval, similarity and classification scores for every width, student beside teacher."""

from __future__ import annotations

from jasper_fast.evalsets import EvalSet, load_eval, load_evals

__all__ = ["EvalSet", "load_eval", "load_evals"]
