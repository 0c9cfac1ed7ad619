"""Names of what METok attaches to a video item on its way from the
front end to the scheduler and the worker.
"""

PLAN_FIELD = "metok_plan"
"""int64, a `VideoPlan`. Every video has one, METok on or off; read by the scheduler and by the worker."""

FRAME_TEXT_FIELD = "metok_frame_text"
"""int64 [2 T + ids], the text inside a video's placeholders; see `frame_text.py`.

Every video has one, METok on or off, where the model labels its frames; read by the worker.
"""

EXTENT_FIELD = "metok_extent"
"""int64 [], positions that a video takes on its longest rotary axis, METok on or off; see `extents.py`.

Every video has one where that can be more than its tokens; read by the scheduler.
"""

QUESTION_FIELD = "metok_question"
"""int64 [1 + tokens]: how many tokens, then the question's ids for
the LLM. Read by the aligner `embedding`.
"""

ROWS_FIELD = "metok_rows"
"""int64 [1 + tokens]: how many, then the positions in the prompt of the tokens whose attention scores.

Not there where all text behind a video scores; read by the worker.
"""

WINDOWS_FIELD = "metok_windows"
"""int64 [windows, length]: the question in the windows of a dual tower's text side.

Read by the aligner `dual-tower`.
"""

PIXELS_FIELD = "metok_pixels"
"""float32 [T, 3, h, w]: the frames as a dual tower's image side takes them.

Read by the aligner `dual-tower`.
"""
