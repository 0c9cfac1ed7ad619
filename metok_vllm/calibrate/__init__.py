"""`metok calibrate` and `metok probe`: which settings leave a model's answers what they are, measured without
labels through the engine itself (docs/calibration.md).
"""
