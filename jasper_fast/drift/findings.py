"""The differences that a comparison can name, each with its fix."""

from __future__ import annotations

from dataclasses import dataclass

from jasper_fast.drift.side import Prompts

FIXES = {
    "pooling": "set the pooling mode of the server or of 1_Pooling/config.json to that of the model",
    "head": "serve the ONNX graph or the headless form, or a server that applies Dense modules",
    "prompt": "set the model's prompts, or let the client put them before the texts (--send-prompts compares that)",
    "roles": "embed queries as queries and documents as documents: exchange the prompts, or the routes of the model",
    "normalisation": "turn normalisation on, or divide each embedding by its length",
    "width": "request the same width from both, for example with --dimensions N",
    "revision": "load the weights that the embeddings in use were computed with, or compute all of them again",
    "model": "compare with the golden file or the folder of the same model",
    "int8": "serve the fp32 weights, or accept the loss with --accept int8",
    "length": "set the maximum length of both to the same number of tokens",
    "padding": "update the server or the graph so that padding is masked, or send one text at a time",
    "rotation": "compute all embeddings with one of the two; search within one of them gives the same results",
}


@dataclass(frozen=True)
class Finding:
    """A difference that was found.

    Args:
        kind: one of :data:`FIXES`.
        text: the difference as a clause, with the letters A and B for the sides.
        cosine_min: smallest cosine after the settings were matched. None: nothing was matched.
        exact: True if the matched settings explain the difference within the limit.
    """

    kind: str
    text: str
    cosine_min: float | None = None
    exact: bool = True

    @property
    def fix(self) -> str:
        """Advice for the user."""
        return FIXES[self.kind]


def prompt_text(this: str, other: str, own: Prompts, used: Prompts) -> str:
    """Describe the prompts of two sides, for the roles in which they differ.

    Args:
        this: letter of the side whose prompts are ``own``.
        other: letter of the side whose prompts are ``used``.
        own: prompts by role.
        used: prompts by role.
    """
    plural = {"query": "queries", "document": "documents"}
    parts = [
        f"{other} puts {_shown(used[role])} before {plural[role]}, and {this} puts {_shown(own[role])}"
        for role in own
        if own[role] != used[role]
    ]
    return "; ".join(parts)


def _shown(prompt: str) -> str:
    return repr(prompt) if prompt else "no prompt"
