"""How far the answers of a running server are from what its model says without METok (`shadow_rate`).

`exchange.py` remembers a request, `replay.py` asks it twice more with the answer told, `traffic.py` finds the
moments for that, and `record.py` is what an operator sees of it.
"""
