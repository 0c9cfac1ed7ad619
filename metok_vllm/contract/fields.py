"""Names of what METok attaches to a video item on its way from the
front end to the scheduler and the worker.
"""

PLAN_FIELD = "metok_plan"
"""int64, a `VideoPlan`. Every video has one, METok on or off; read by the scheduler and by the worker."""

QUESTION_FIELD = "metok_question"
"""int64 [1 + tokens]: how many tokens, then the question's ids for
the LLM. Read by the aligner `embedding`.
"""

WINDOWS_FIELD = "metok_windows"
"""int64 [windows, length]: the question in the windows of a dual tower's text side.

Read by the aligner `dual-tower`.
"""

PIXELS_FIELD = "metok_pixels"
"""float32 [T, 3, h, w]: the frames as a dual tower's image side takes them.

Read by the aligner `dual-tower`.
"""
