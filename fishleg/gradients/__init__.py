"""Per-sample gradients: captured, streamed over a calibration set, and summed by a rank group."""
