"""The parts of :mod:`jasper_fast.adaptation.migrate`: the old index, pairs of documents and rows, maps, report."""
