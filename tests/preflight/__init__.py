"""The matrix: problems provoked between two real agents, and good combinations, each with what a check must say.

A module for each area has its cases (`cases.problem`, `cases.fits`); `stage` makes the hosts and guests that they ask
for. `test_matrix` runs them all, and so does `python -m bench preflight`, which prints the table.
"""
