"""What guesses can gain at best, by what steps cost."""

from __future__ import annotations

import pytest

from benchmarks.row_costs import MOST_GUESSES, SEQUENCES, best_gain, render_costs, render_gains


def test_where_rows_are_free_every_guess_is_worth_it() -> None:
    assert best_gain(2, 1.0, lambda _: 0.01) == pytest.approx(1 + MOST_GUESSES)
    assert best_gain(4, 0.5, lambda _: 0.01) == pytest.approx(sum(0.5**place for place in range(MOST_GUESSES + 1)))


def test_where_rows_cost_what_steps_do_nothing_is_gained() -> None:
    assert best_gain(4, 1.0, lambda rows: 0.001 * rows) == pytest.approx(1.0)
    assert best_gain(4, 0.5, lambda rows: 0.001 * rows) == 1.0


def test_the_best_number_is_neither_none_nor_all() -> None:
    """Two sequences: the first guess of each costs a tenth of a step, further ones a whole one each."""
    seconds = {2: 1.0, 3: 1.1, 4: 1.2}
    assert best_gain(2, 0.5, lambda rows: seconds.get(rows, 1.2 + rows - 4)) == pytest.approx(3 / 2 / 1.2)


def test_tables_of_several_starts() -> None:
    tables = [{1: 0.002, 64: 0.064}, {1: 0.003, 64: 0.060}, {1: 0.0025, 64: 0.062}]
    assert render_costs(tables).splitlines()[2] == "| ms | 2.50 [2.00-3.00] | 62.00 [60.00-64.00] |"
    gains = render_gains(tables, beside_s=0.0).splitlines()
    assert len(gains[2].split("|")) == len(SEQUENCES) + 3
    # by the medians 9 rows take 2.5 + 8 · 59.5 / 63 = 10.06 ms, and sure guesses make 9 tokens of one: 9 · 2.5 / 10.06
    assert gains[2].startswith("| 1 | 2.24 |")
