"""One file a model family. Its front-end half runs in the API server's process, its model class in each worker.

`base.py` is what all families share in the worker, `registry.py` the table of what is served.
"""
