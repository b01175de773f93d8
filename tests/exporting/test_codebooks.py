"""Token tables in bytes: how close the layers come, and that rows do not depend on each other."""

from __future__ import annotations

import numpy as np
import pytest

from jasper_fast.exporting.codebooks import code_table


@pytest.mark.parametrize("width", [32, 6])
def test_layers_approximate_rows(width: int) -> None:
    generator = np.random.default_rng(1)
    rows = generator.normal(3, 2, (900, width)).astype(np.float32) * generator.uniform(0.1, 4, width).astype(np.float32)
    rows[5] = 0
    table = code_table(rows)
    first, second = (table.spread * layer.rows() for layer in table.layers)
    left = [((rows - approximate) ** 2).sum() for approximate in (table.centre, table.centre + first)]
    both = ((rows - table.centre - first - second) ** 2).sum()
    assert left[1] < 0.15 * left[0] and both < 0.15 * left[1]
    assert table.layers[0].codes.dtype == np.uint8 and table.layers[0].scales.dtype == np.float16


def test_a_table_is_the_same_each_time() -> None:
    rows = np.random.default_rng(2).normal(size=(40, 8)).astype(np.float32)  # fewer blocks than entries
    first, second = code_table(rows), code_table(rows)
    assert np.array_equal(first.layers[1].codes, second.layers[1].codes)
    assert np.isfinite(first.layers[0].rows()).all()
