"""Decoding of video files in child processes, so that no file can take the server with it.

`pool` is the API server's side: it hands out the budget and waits. `spawner` is one small process that forks
a child for every file and kills it when its time is up. `child` decodes, inside the limits that `confine`
sets. `messages` is what they say to each other, `budget` who may go on when.

Three processes, because a fork is cheap (milliseconds) only from a process that is small and has no threads:
the API server is neither. A child lives for one file. So no file sees another one's memory.
"""
