"""`metok demo`: a process of its own that starts a server, asks it questions and draws what METok did.

Needs the extra `demo`.
"""
