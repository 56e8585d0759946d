"""Tracking: one run as MLflow runs, or as JSON lines."""

from pipeline.tracking.base import (
    AbstractTracker,
    CellFacts,
    RunFacts,
    TrackerName,
    TrackingProgress,
    TrackingThread,
    make_tracker,
    tracking_uri,
)

__all__ = [
    "AbstractTracker",
    "CellFacts",
    "RunFacts",
    "TrackerName",
    "TrackingProgress",
    "TrackingThread",
    "make_tracker",
    "tracking_uri",
]
