"""Files for torchao, read and applied by torchao itself, in a process of its own.

torchao is not in the environment but beside it (`make` puts it into .venv/targets): transformers
loads a torchao that it finds, which takes seconds and prints, whether it is used or not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BESIDE = Path(sys.prefix) / "targets"

APPLY = """
import json, sys, warnings
import torch
from torch import nn
warnings.simplefilter("ignore")
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import FqnToConfig, quantize_
from mpq.core.chosen import Chosen
from mpq.core.formats import parse_scheme
from mpq.export import get_exporter
from mpq.export.rules import runnable
from mpq.nn.graph import build_graph
from tests.builders import layer

torch.manual_seed(0)
exporter = get_exporter("torchao")
kinds = {
    "linear": (nn.Linear(64, 32), torch.randn(3, 64)),
    "embedding": (nn.Embedding(9, 64), torch.arange(6).reshape(2, 3)),
    "conv2d": (nn.Conv2d(8, 4, 3), torch.randn(2, 8, 5, 5)),
}
applied = 0
for kind, (module, sample) in kinds.items():
    original = nn.Sequential(module)
    graph = build_graph(original, sample, embeddings=True)
    weight = module.weight.detach()
    for scheme in runnable(exporter, graph.layers[0]):
        chosen = Chosen(graph=graph, schemes={"0": scheme})
        text = exporter.text(chosen)
        config = config_from_dict(json.loads(text))
        assert isinstance(config, FqnToConfig)
        if scheme.is_native:
            assert config.fqn_to_config == {"0": None}
            continue
        one = json.loads(text)["_data"]["fqn_to_config"]["0"]
        assert config_to_dict(config.fqn_to_config["0"]) == one, (one, config)
        model = nn.Sequential(type(module)(*{
            "linear": (64, 32), "embedding": (9, 64), "conv2d": (8, 4, 3)}[kind]))
        model.load_state_dict(original.state_dict())
        quantize_(model, config, filter_fn=None)
        found = model[0].weight
        assert type(found.data) is not torch.Tensor, (kind, str(scheme))
        worst = (found.dequantize().float() - weight).abs().max() / weight.abs().max()
        assert worst <= 1.01 / (2**scheme.weights.bits - 1) * 2, (kind, str(scheme), worst)
        if scheme.weights.bits == 8:
            change = (model(sample) - original(sample)).abs().max()
            assert change < 0.05, (kind, str(scheme), change)
        applied += 1
print("applied", applied)
"""

HUGGING_FACE = """
import json, logging, warnings
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
import torch
from torchao.quantization import FqnToConfig
from transformers import TorchAoConfig
from mpq.core.chosen import Chosen
from mpq.core.formats import parse_scheme
from mpq.export import get_exporter
from tests.builders import llama_graph

graph = llama_graph()
names = [name for unit in graph.units for name in unit.layers]
schemes = dict.fromkeys(names, parse_scheme("int4g32")) | {names[-1]: parse_scheme("fp32")}
text = get_exporter("torchao-hf").text(Chosen(graph=graph, schemes=schemes))
made = json.loads(text)["quantization_config"]
assert made.pop("quant_method") == "torchao"
config = TorchAoConfig.from_dict(made)
assert isinstance(config.quant_type, FqnToConfig)
assert set(config.modules_to_not_convert) == {names[-1], "model.embed_tokens", "lm_head"}
assert config.quant_type.fqn_to_config[names[0]].weight_dtype == torch.int4
print("read")
"""


def run_beside(code: str) -> str:
    if not (BESIDE / "torchao").is_dir():
        told = f"torchao is not in {BESIDE}: `make test` puts it there"
        if os.environ.get("CI"):
            pytest.fail(told)
        pytest.skip(told)
    root = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(root), str(BESIDE))),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_torchao_applies_every_scheme_and_transformers_reads_the_config_of_a_model() -> None:
    applied, read = run_beside(APPLY + HUGGING_FACE).splitlines()
    assert int(applied.removeprefix("applied ")) > 100
    assert read == "read"
