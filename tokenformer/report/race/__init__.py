"""The page of a full race: many runs per arm, with trials, budgets, seeds and controls, by docs/fairness.md.

read.py reads the folders, numbers.py puts them through the statistics, words.py says what they support,
charts.py chooses what is drawn, tables.py, verdicts.py and page.py lay out.
"""
