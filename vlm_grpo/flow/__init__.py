"""The flow check: every kind of medium reaches the loss, shown before step 1."""

from .check import FlowCheck

__all__ = ["FlowCheck"]
