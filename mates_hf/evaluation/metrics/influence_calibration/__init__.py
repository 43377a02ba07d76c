"""The folder that `evaluate.load` takes for `influence_calibration`."""
