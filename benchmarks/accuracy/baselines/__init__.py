"""Other ways to spend fewer visual tokens, for comparison with METok:
one method, one file, from its paper's description.
"""
