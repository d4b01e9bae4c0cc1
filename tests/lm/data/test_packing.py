"""Rows of whole conversations; what is in them is tested in test_chat.py."""

from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.packing import best_fit


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(0, 30), max_size=60), space=st.integers(30, 64))
def test_best_fit_packs_everything_once_and_opens_no_row_in_vain(sizes, space):
    rows = best_fit(sizes, space)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    loads = [sum(sizes[index] for index in row) for row in rows]
    assert all(load <= space for load in loads)
    # Whatever opened a row fitted into none of those before it.
    for number, row in enumerate(rows):
        at_most = [sum(sizes[i] for i in other) for other in rows[:number]]
        assert all(load + sizes[row[0]] > space for load in at_most)
