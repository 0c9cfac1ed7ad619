"""Triton backend `cpu`: a driver for Triton's interpreter,
found through the entry point group `triton.backends`.
"""
