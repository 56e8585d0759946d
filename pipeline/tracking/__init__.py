"""Tracking: one run as MLflow runs, or as JSON lines."""

from pipeline.tracking.base import (
    AbstractTracker,
    CellEnd,
    CellFacts,
    RunFacts,
    TrackerName,
    TrackingProgress,
    destination,
    make_tracker,
    place,
)
from pipeline.tracking.recorder import News, Recorder
from pipeline.tracking.thread import TrackingThread

__all__ = [
    "AbstractTracker",
    "CellEnd",
    "CellFacts",
    "News",
    "Recorder",
    "RunFacts",
    "TrackerName",
    "TrackingProgress",
    "TrackingThread",
    "destination",
    "make_tracker",
    "place",
]
