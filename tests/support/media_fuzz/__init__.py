"""Video files made to break the decoder: valid files, changed by named, repeatable operations.

- `element`: the common form of a file, a tree of parts, each with a name, a body and a stated size.
- `trees`, `streams`: read and write it for each container. `bases`: the valid files.
- `operations`: the registry, which `generic`, `mp4_parts`, `ebml_parts`, `ts_parts`, `other_parts` and
  `pictures` fill.
- `cases`: draws a case from a seed, builds its bytes, reads and prints it as one line, shrinks it.
- `runner`: decodes one case in the server's pool of child processes. `judge`: says what is wrong with what
  became of it.

``python -m tests.support.media_fuzz`` runs it.
"""
