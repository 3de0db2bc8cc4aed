"""The page of a full race: many runs per arm, with trials, budgets, seeds and controls, by docs/fairness.md.

read.py reads the folders, numbers.py puts them through the statistics, controls.py finds the controls of each arm,
words.py says what they support and doubts.py what speaks against it, charts.py chooses what is drawn, tables.py,
verdicts.py and page.py lay out.
"""
