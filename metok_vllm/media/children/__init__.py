"""Decoding of video files in child processes, so that no file can take the server with it.

The API server's side: `pool` hands out places and memory (`budget`) and counts what came of each video
(`outcomes`); `attempt` is one video on its way through a child; `forks` holds the process that forks.
The other side: `spawner` is that process, which forks a child for every file and kills it when its time is
up; `child` decodes, inside the limits that `confine` sets; `warm_up` is done before a file comes. `messages`
is how they talk, and `words` what of a child's the server believes.

Three processes, because a fork is cheap (milliseconds) only from a process that is small and has no threads:
the API server is neither. A child lives for one file. So no file sees another one's memory.
"""
