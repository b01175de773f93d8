"""The examples in docstrings run, and show what they print."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import jasper_fast.losses

MODULES = [
    *(f"jasper_fast.losses.{module.name}" for module in pkgutil.iter_modules(jasper_fast.losses.__path__)),
    *(f"jasper_fast.mips.{name}" for name in ("top_k", "index", "binary", "funnel", "exports")),
    *(f"jasper_fast.fitting.{name}" for name in ("statistics", "maps", "projections")),
    "jasper_fast.mteb",
    "jasper_fast.pictures",
    "jasper_fast.sentence_transformers",
]
# Public functions and classes that must have an example.
PUBLIC = [
    "jasper_fast.losses.cosine_loss",
    "jasper_fast.losses.similarity_loss",
    "jasper_fast.losses.relative_similarity_loss",
    "jasper_fast.losses.neighbourhood_loss",
    "jasper_fast.losses.listwise_loss",
    "jasper_fast.losses.info_nce_loss",
    "jasper_fast.losses.JasperLoss",
    "jasper_fast.mips.FlatIPIndex",
    "jasper_fast.mips.SignIndex",
    "jasper_fast.mips.funnel",
    "jasper_fast.mips.funnel_recall",
    "jasper_fast.mips.topk",
    "jasper_fast.mteb.load",
    "jasper_fast.pictures.ImageModel",
    "jasper_fast.pictures.load",
    "jasper_fast.pictures.image_files",
    "jasper_fast.sentence_transformers.JasperLoss",
    "jasper_fast.train.train",
    "jasper_fast.training.loop.train_stage",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module_run(name):
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(name), verbose=False)
    assert not result.failed, f"python -m doctest on {name} shows the differences"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_have_an_example(name):
    module, _, attribute = name.rpartition(".")
    documented = getattr(importlib.import_module(module), attribute).__doc__
    assert doctest.DocTestParser().get_examples(documented), f"{name}: add an Example: block"
