"""What all processes agree on: settings, a video's plan, budgets, refusals, counters.

Imports `compression` and nothing else of METok.
"""
