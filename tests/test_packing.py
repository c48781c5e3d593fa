"""Networks and batches as files: bit for bit, and nothing runs that a file names."""

from __future__ import annotations

import enum
import functools
import json
import os
import struct
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional

from mpq.artifacts import keep_batches, restored
from mpq.core.errors import InvalidInputError, StorageError
from mpq.packing.reading import read
from mpq.packing.writing import SKELETON, write
from mpq.store.store import open_store
from mpq.trust import TRUSTED
from tests.builders import CASES, Decoder, case, mlp


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUSTED, "tests")


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return mlp().eval()


def judge(model: nn.Module) -> dict[str, float]:
    with torch.no_grad():
        return {"mean": float(model(torch.ones(1, 6)).mean())}


# Networks and batches, bit for bit


def round_trip(path: Path, value: Any, **options: Any) -> Any:
    write(path / "file", value, "value", **options)
    return read(path / "file", **options)


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    def bits(tensor: torch.Tensor) -> bytes:
        flat = tensor.detach().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().tobytes()

    alike = (one.dtype, one.shape, one.stride(), one.requires_grad, type(one))
    return alike == (
        two.dtype,
        two.shape,
        two.stride(),
        two.requires_grad,
        type(two),
    ) and bits(one) == bits(two)


def assert_same_network(one: nn.Module, two: nn.Module) -> None:
    modules, again = dict(one.named_modules()), dict(two.named_modules())
    assert {n: (type(m), m.training) for n, m in modules.items()} == {
        n: (type(m), m.training) for n, m in again.items()
    }
    for kind in ("named_parameters", "named_buffers"):
        there = dict(getattr(one, kind)(remove_duplicate=False))
        found = dict(getattr(two, kind)(remove_duplicate=False))
        assert list(there) == list(found)
        assert all(same_bits(there[name], found[name]) for name in there)
        # What is one tensor under several names stays one.
        ids = [[sorted(n for n in t if t[n] is t[name]) for name in t] for t in (there, found)]
        assert ids[0] == ids[1]


@pytest.mark.parametrize("name", CASES)
def test_a_network_comes_back_bit_for_bit(name: str, tmp_path: Path, trusted: None) -> None:
    model, batch = case(name)
    next(model.children()).eval()
    for parameter in list(model.parameters())[:1]:
        parameter.requires_grad_(False)
    again = round_trip(tmp_path, model)
    assert_same_network(model, again)
    model.eval()
    again.eval()
    arguments = batch if isinstance(batch, dict) else {}
    given = () if isinstance(batch, dict) else (batch,)
    with torch.no_grad():
        one, two = model(*given, **arguments), again(*given, **arguments)
    if isinstance(one, dict):
        one, two = one["logits"], two["logits"]
    assert torch.equal(one, two)


TORCH_MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lstm": (lambda: nn.LSTM(4, 3, num_layers=2), (2, 5, 4)),
    "attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", dropout=0.0),
        (3, 2, 8),
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), 2, enable_nested_tensor=False
        ),
        (3, 2, 8),
    ),
    "upsample": (lambda: nn.Upsample(scale_factor=2.0), (1, 2, 3, 3)),
    "pool": (lambda: nn.AvgPool2d(2), (1, 2, 4, 4)),
}


@pytest.mark.parametrize("name", TORCH_MODULES)
def test_networks_of_torch_alone_need_no_trust(name: str, tmp_path: Path) -> None:
    make, shape = TORCH_MODULES[name]
    torch.manual_seed(0)
    model = make().eval()
    assert write(tmp_path / "file", model, "model") == ()
    again = read(tmp_path / "file")
    assert_same_network(model, again)
    x = torch.randn(shape)
    one, two = model(x), again(x)
    assert torch.equal(*((one[0], two[0]) if isinstance(one, tuple) else (one, two)))


def test_modules_of_others_come_back_only_where_they_are_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert write(tmp_path / "file", Decoder(), "model") == ("tests.builders",)
    for value in ("", "test", "tests.builders2", "tests.builders.Decoder", "numpy,scipy"):
        monkeypatch.setenv(TRUSTED, value)
        with pytest.raises(InvalidInputError, match=f"set {TRUSTED}=.*tests.builders") as told:
            read(tmp_path / "file")
        assert told.value.code == "untrusted"
        assert "\n" not in str(told.value)
    for value in ("tests", "a, tests.builders"):
        monkeypatch.setenv(TRUSTED, value)
        assert isinstance(read(tmp_path / "file"), Decoder)


class Colour(enum.Enum):
    RED = "red"


class Slotted:
    __slots__ = ("x", "y")

    def __init__(self) -> None:
        self.x, self.y = 1, [2]


class Listed(list):  # type: ignore[type-arg]
    pass


class Odd(nn.Module):
    """Holds about everything that an attribute may be."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.arange(12.0)
        self.view, self.other = base[2:6], base[4:8]
        self.turned = torch.randn(3, 4).t()
        self.act, self.norm, self.colour = functional.gelu, nn.LayerNorm, Colour.RED
        self.slotted, self.listed, self.me = Slotted(), Listed([1, torch.ones(2)]), [self]
        self.array, self.number = np.arange(3), np.float32(0.1)
        self.plain = {
            1: (None, True, 2**70, 1e-300, float("nan"), float("-inf"), 1 + 2j),
            "b": [b"\x00\xff", {3, 1, 2}, frozenset("ab"), slice(1, None), range(3)],
            (1, "c"): OrderedDict(a=torch.float16, b=torch.device("cpu"), c=torch.Size([2])),
        }
        self.again, self.judge = self.slotted, judge


def test_attributes_come_back(tmp_path: Path, trusted: None) -> None:
    one = Odd()
    two = round_trip(tmp_path, one)
    two.view[2] = -1.0  # the fourth of what the other sees as its first
    assert two.other[0] == -1.0
    assert two.view.untyped_storage().nbytes() <= 12 * 4
    assert two.turned.stride() == (1, 4)
    assert (two.act, two.norm, two.colour) == (functional.gelu, nn.LayerNorm, Colour.RED)
    assert (two.slotted.x, two.slotted.y) == (1, [2])
    assert two.again is two.slotted
    assert two.me[0] is two
    assert two.judge is judge
    assert type(two.listed) is Listed
    assert two.listed[0] == 1
    assert np.array_equal(two.array, one.array)
    assert type(two.number) is np.float32
    assert two.number == one.number
    assert repr(two.plain) == repr(one.plain)


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.bool, torch.int8, torch.uint16, torch.int64),
        *(torch.bfloat16, torch.float8_e4m3fn, torch.complex128),
    ],
    ids=str,
)
def test_every_kind_of_number_stays(dtype: torch.dtype, tmp_path: Path) -> None:
    raw = torch.randint(0, 2, (64,), dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(2, -1)
    again = round_trip(tmp_path, [tensor, tensor[:, :1], torch.empty(0, 3, dtype=dtype)])
    assert same_bits(tensor, again[0])
    assert same_bits(tensor[:, :1], again[1])
    assert again[2].shape == (0, 3)


def test_batches_of_any_shape_come_back(tmp_path: Path) -> None:
    with open_store(tmp_path / "runs.db") as store:
        from collections import UserDict, namedtuple

        pair = namedtuple("pair", "x y")
        given = [
            torch.arange(4),
            UserDict(input_ids=torch.ones(2, 3), more={"mask": None, "n": 3}),
            pair(torch.zeros(2), "text"),
        ]
        found = restored(store, keep_batches(store, given, "calibration"))
        assert torch.equal(found[0], given[0])
        assert type(found[1]) is dict
        assert found[1]["more"] == {"mask": None, "n": 3}
        assert type(found[2]) is tuple
        for bad in (object(), judge, nn.Linear(1, 1), Colour.RED):
            with pytest.raises(InvalidInputError, match=r"calibration\[0\].x is a .*cannot be"):
                keep_batches(store, [{"x": bad}], "calibration")


def test_a_slice_does_not_bring_what_it_was_cut_from(tmp_path: Path) -> None:
    write(tmp_path / "file", [torch.zeros(1_000_000)[500_000:500_010]], "value")
    assert (tmp_path / "file").stat().st_size < 2000


@pytest.mark.slow
def test_the_same_content_has_the_same_digest_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.test_packing import network, Odd;"
        "import torch; from mpq.packing.writing import write;"
        "torch.manual_seed(0); write(Path(sys.argv[1]), [network(), {'a', 'b', 'c'}, Odd()], 'x')"
    )
    for number in range(2):
        environment = os.environ | {"PYTHONHASHSEED": str(number)}
        command = [sys.executable, "-c", code, str(tmp_path / str(number))]
        subprocess.run(command, check=True, env=environment, timeout=100)
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()


# What cannot be kept is told when it is submitted


def local_class() -> nn.Module:
    class Local(nn.Module):
        pass

    return Local()


def with_attribute(value: Any) -> nn.Module:
    model = network()
    model.extra = value
    return model


def of_main() -> nn.Module:
    cls = type("Main", (nn.Module,), {"__module__": "__main__"})
    model: nn.Module = cls()
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "local": (local_class, "cannot import 'local_class.<locals>.Local' of 'tests.test_packing'"),
    "main": (of_main, "cannot import 'Main' of '__main__'"),
    "lambda": (lambda: with_attribute(lambda x: x), "cannot import 'with_attribute|cannot import"),
    "partial": (lambda: with_attribute(functools.partial(judge)), "is a functools.partial"),
    "method": (lambda: with_attribute(nn.Linear(1, 1).forward), "is a builtins.method"),
    "file": (lambda: with_attribute(sys.stdout), "cannot"),
    "hook": (lambda: hooked(), "cannot import"),
    "meta": (lambda: nn.Linear(2, 2, device="meta"), "only dense ones with values"),
    "sparse": (lambda: with_attribute(torch.eye(2).to_sparse()), "only dense ones"),
    "script": (lambda: torch.jit.script(nn.Linear(2, 2)), "cannot"),
}


def hooked() -> nn.Module:
    model = network()
    model.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("name", REFUSED)
def test_what_another_process_cannot_have_is_refused(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    with pytest.raises(InvalidInputError, match=message) as told:
        write(tmp_path / "file", make(), "model")
    assert "package.module:factory" in str(told.value) or "dense" in str(told.value)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "file").exists()


# Hostile files: nothing of what they name is imported or called


def plain(value: Any = None, *objects: Any, tensors: Any = ()) -> dict[str, Any]:
    return {
        "format": 1,
        "value": value,
        "objects": list(objects),
        "order": list(range(len(objects))),
        "tensors": list(tensors),
    }


def made(cls: str, state: Any = None, *args: Any, **more: Any) -> dict[str, Any]:
    return {
        "class": cls,
        "args": {"tuple": list(args)},
        "state": state,
        "items": [],
        "pairs": [],
    } | more


def state(**values: Any) -> dict[str, Any]:
    return {"dict": [[key, value] for key, value in values.items()]}


def tensor(**changes: Any) -> dict[str, Any]:
    told = {"storage": 0, "dtype": "float32", "size": [2], "stride": [1], "offset": 0}
    return told | {"parameter": False, "requires_grad": False} | changes


LINEAR, OBJECT = "torch.nn.modules.linear:Linear", {"object": 0}
HOSTILE: dict[str, dict[str, Any]] = {
    "os.system": plain(OBJECT, made("os:system", None, "touch hacked")),
    "named os.system": plain({"named": "os:system"}),
    "as the forward of a layer": plain(
        OBJECT, made(LINEAR, state(forward={"named": "posix:system"}))
    ),
    "a hook": plain(
        OBJECT, made(LINEAR, state(_forward_hooks={"dict": [[0, {"named": "builtins:exec"}]]}))
    ),
    "popen": plain(OBJECT, made("subprocess:Popen", None, "touch hacked")),
    "partial": plain(OBJECT, made("functools:partial", None, {"named": "os:system"}, "true")),
    "getattr": plain({"named": "builtins:getattr"}),
    "import of a module that acts": plain({"named": "tests_hostile_module:anything"}),
    "by way of a trusted module": plain({"named": "tests.test_packing:subprocess.Popen"}),
    "what a trusted module imported": plain({"named": "tests.test_packing:open_store"}),
    "attribute of a class": plain({"named": "tests.test_packing:Colour.__class__"}),
    "dunder of a function": plain({"named": "tests.test_packing:judge.__globals__"}),
    "torch.load": plain({"named": "torch.serialization:load"}),
    "torch.jit": plain(OBJECT, made("torch.jit._script:RecursiveScriptModule", state())),
    "graph module": plain(OBJECT, made("torch.fx.graph_module:GraphModule", state(_code="1/0"))),
    "remote module": plain(OBJECT, made("torch.distributed.nn.api.remote_module:RemoteModule")),
    "torch's own imports": plain({"named": "torch.nn.modules.module:functools"}),
    "function of torch.nn": plain(
        {"named": "torch.nn.modules.module:register_module_forward_hook"}
    ),
    "torch class that is no network": plain(
        OBJECT, made("torch.nn.modules.module:_WrappedHook", state(hook=None))
    ),
    "type": plain(OBJECT, made("builtins:type", None, "X", {"tuple": []}, {"dict": []})),
    "class attribute": plain(
        OBJECT,
        made("tests.test_packing:Slotted", {"tuple": [None, state(__class__={"named": LINEAR})]}),
    ),
    "enum of no enum": plain({"enum": [LINEAR, "forward"]}),
    "enum of os": plain({"enum": ["os:_Environ", "x"]}),
    "unknown kind": plain({"reduce": ["os:system", ["true"]]}),
    "state that is no table": plain(OBJECT, made(LINEAR, 5)),
    "beyond its memory": plain({"tensor": 0}, tensors=[tensor(size=[10**9])]),
    "before its memory": plain({"tensor": 0}, tensors=[tensor(offset=-1)]),
    "backwards": plain({"tensor": 0}, tensors=[tensor(stride=[-1])]),
    "no numbers": plain({"tensor": 0}, tensors=[tensor(dtype="load")]),
    "numbers that import": plain({"tensor": 0}, tensors=[tensor(dtype="_inductor")]),
    "no such tensor": plain({"tensor": 7}),
    "integers with gradients": plain(
        {"tensor": 0}, tensors=[tensor(dtype="int32", parameter=True, requires_grad=True)]
    ),
    "another format": plain() | {"format": 2},
    "no skeleton": {},
}

_AUDITED: list[str] | None = None
_ACTS = ("os.", "subprocess.", "exec", "compile", "pickle.", "socket.", "ctypes.", "shutil.")
_HARMLESS = ("os.listdir", "os.scandir", "os.fwalk")


def _audit(event: str, _: object) -> None:
    if _AUDITED is not None and event.startswith(_ACTS) and event not in _HARMLESS:
        _AUDITED.append(event)


sys.addaudithook(_audit)  # for the life of the process: idle unless a test listens


def file_of(path: Path, skeleton: dict[str, Any]) -> Path:
    head = torch.frombuffer(bytearray(json.dumps(skeleton).encode()), dtype=torch.uint8)
    storage = torch.zeros(8, dtype=torch.uint8)
    safetensors.torch.save_file({SKELETON: head, "0": storage}, path)
    return path


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_and_nothing_runs(
    name: str, tmp_path: Path, trusted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    global _AUDITED
    acts = tmp_path / "tests_hostile_module.py"
    acts.write_text("open('hacked', 'w').close()")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = file_of(tmp_path / "file", HOSTILE[name])
    before = set(sys.modules)
    _AUDITED = []
    try:
        with pytest.raises((InvalidInputError, StorageError)) as told:
            read(path)
        heard = _AUDITED
    finally:
        _AUDITED = None
    assert heard == []
    assert told.value.code in ("untrusted", "artifact_format")
    assert "\n" not in str(told.value)
    assert set(sys.modules) == before
    assert not (tmp_path / "hacked").exists()


def test_the_ear_of_these_tests_hears(tmp_path: Path) -> None:
    import pickle

    global _AUDITED
    _AUDITED = []
    try:
        pickle.loads(pickle.dumps(judge))
        os.system("true")
        heard = _AUDITED
    finally:
        _AUDITED = None
    assert {"pickle.find_class", "os.system"} <= set(heard)


@pytest.mark.parametrize("value", [plain(OBJECT, made(LINEAR, state())), plain({"named": LINEAR})])
def test_batches_have_no_classes(value: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read a kept object"):
        read(file_of(tmp_path / "file", value), classes=False)


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04cos\nsystem\n", struct.pack("<Q", 2**60), b"PK"]
)
def test_other_files_are_no_objects(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(StorageError, match="cannot read a kept object"):
        read(tmp_path / "file")


def test_deeply_nested_files_are_refused(tmp_path: Path) -> None:
    text = json.dumps(plain(0)).replace('"value": 0', '"value": ' + '{"list":[' * 50_000)
    head = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    safetensors.torch.save_file({SKELETON: head}, tmp_path / "file")
    with pytest.raises(StorageError, match="cannot read a kept object"):
        read(tmp_path / "file")
