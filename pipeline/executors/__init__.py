"""Executors: they run tasks in other processes, on this machine or on a Ray cluster."""

from pipeline.executors.base import AbstractExecutor, ExecutorName, make_executor

__all__ = ["AbstractExecutor", "ExecutorName", "make_executor"]
