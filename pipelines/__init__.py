"""What is to be done: the pipeline file, the plan, runs, the gate, the reader and the command line."""

from penstock.pipelines.opened import Coverage, Found
from penstock.pipelines.pipeline import Pipeline
from penstock.pipelines.reader import OpenIndex, open_index

__all__ = ["Coverage", "Found", "OpenIndex", "Pipeline", "open_index"]
