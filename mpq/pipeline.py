"""The stages of a search in order; reads as the data flow.

model + calibration -> graph -> cells -> costs -> scores -> problem -> candidates -> measured choice
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from mpq.choices import make_cells, parse_schemes
from mpq.core.errors import InfeasibleError, InvalidInputError, MpqError, RunFailedError
from mpq.core.evaluation import Evaluation
from mpq.core.formats import Scheme
from mpq.core.jobs import JobSpec, RunState
from mpq.core.layers import Layer, LayerGraph
from mpq.core.problem import Allocation, Budget, BudgetText, Problem, Solution, Status
from mpq.core.protocols import Executor, Partial, Scores, Task
from mpq.core.tables import Cells, CostTable, SensitivityTable
from mpq.evaluate import Bench, Candidate, measure, prepare
from mpq.export.packed import write_packed
from mpq.models import load_batches, load_function, load_model
from mpq.nn.batches import Batch, check_batches, cut, output_tensor
from mpq.nn.calibrate import input_limits
from mpq.nn.divergence import OutputDivergence, detect
from mpq.nn.fingerprint import batches_digest, digest, model_digest
from mpq.nn.graph import build_graph
from mpq.nn.quantizers import WeightQuantizer
from mpq.nn.shipping import ship
from mpq.nn.workload import Workload
from mpq.progress import Progress, Silent
from mpq.store.store import Store, open_store
