"""One file a model family: its front-end half runs in the API server, its model class in each worker.

`base.py` is what all families share in the worker, `registry.py` the table of what is served.
"""
