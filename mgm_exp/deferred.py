"""Modules that torch and transformers import for a few names, and that most runs never use: loaded when they are used.

transformers imports SciPy's optimizers for the losses of object detectors; torch's compiler, and with it SymPy, to mark
a few functions that are not to be compiled; checkpoints of sharded tensors for two classes. torch's optimizers import
the compiler for such marks, too. These are a third of the modules that a run imports, and a quarter of its start.
:func:`install` lets such a module be there with the names of :data:`DEFERRED` alone, each of which does what the real
one does. Who asks it for anything else, or calls what needs it, loads it then, in its place, and who imported a name
before gets the real one. So nothing is missing, or other than it was: it is there later.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

StandIn = Callable[..., Any]

_CHECKPOINT = "torch.distributed.checkpoint"
_STORAGE = f"{_CHECKPOINT}.hf_storage"
_GET_ITEM = "torch._dynamo._trace_wrapped_higher_order_op"
_NAMES = "transformers.utils.import_utils"
_SHAPES = "torch.fx.experimental.symbolic_shapes"
# Of a condition that is known these give what it is; of one of symbols they decide.
_OF_CONDITIONS = ("expect_true", "guard_or_false", "guard_or_true", "guard_size_oblivious", "statically_known_true")
# What Python's import system, and whoever goes through all loaded modules, asks of any module.
_OF_EVERY_MODULE = frozenset(
    {"__class__", "__dict__", "__doc__", "__file__", "__loader__", "__name__", "__package__", "__path__", "__spec__"}
)


def _calls(module: str, name: str) -> StandIn:
    """A function that loads the module when it is called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(_loaded(module), name)(*args, **kwargs)

    call.__name__ = call.__qualname__ = name
    return call


def _disable(fn: Any = None, recursive: bool = True, *, reason: str | None = None, wrapping: bool = True) -> Any:
    """``torch._dynamo.disable``: until something is compiled in this process, there is nothing to be disabled."""
    options: dict[str, Any] = {"recursive": recursive, "reason": reason, "wrapping": wrapping}
    if fn is None:
        return functools.partial(_disable, **options)
    if not is_deferred("torch._dynamo") or isinstance(fn, type) or not hasattr(fn, "__code__"):
        return _loaded("torch._dynamo").disable(fn, **options)  # a class or module is changed itself
    does = fn

    def call(*args: Any, **kwargs: Any) -> Any:
        return does(*args, **kwargs)

    def settle() -> None:
        nonlocal does
        compiler = sys.modules["torch._dynamo"]
        compiler.eval_frame.skip_code(call.__code__)
        does = compiler.disable(fn, **options)

    _AFTERWARDS.append(settle)
    if wrapping:
        functools.update_wrapper(call, fn)
    # By these the compiler knows such a function where it meets it.
    vars(call).update(
        _torchdynamo_disable=True,
        _torchdynamo_disable_msg=reason,
        _torchdynamo_disable_recursive=recursive,
        _torchdynamo_orig_callable=fn,
        _torchdynamo_wrapper_id=id(call),
    )
    return call


def _assume_constant_result(fn: Any) -> Any:
    """``torch._dynamo.assume_constant_result``: a mark."""
    fn._dynamo_marked_constant = True
    return fn


def _allow_in_graph(fn: Any) -> Any:
    """``torch._dynamo.allow_in_graph``: the compiler is told when it is there."""
    if not callable(fn):
        return _loaded("torch._dynamo").allow_in_graph(fn)
    _AFTERWARDS.append(lambda: sys.modules["torch._dynamo"].allow_in_graph(fn))
    return fn


def _graph_break(msg: str = "") -> None:
    """``torch._dynamo.graph_break``: nothing, where nothing is compiled."""


def _of_a_bool(name: str) -> StandIn:
    decide = _calls(_SHAPES, name)
    return lambda a, *args, **kwargs: a if type(a) is bool else decide(a, *args, **kwargs)


def _is_nested_int(s: Any) -> bool:
    """``is_nested_int`` of symbolic shapes: no plain number is."""
    return type(s) not in (int, float) and bool(_loaded(_SHAPES).is_nested_int(s))


# What is done once the compiler is loaded.
_AFTERWARDS: list[Callable[[], object]] = []
DEFERRED: dict[str, dict[str, StandIn]] = {
    "scipy.optimize": {"linear_sum_assignment": _calls("scipy.optimize", "linear_sum_assignment")},
    "torch._dynamo": {
        "allow_in_graph": _allow_in_graph,
        "assume_constant_result": _assume_constant_result,
        "disable": _disable,
        "graph_break": _graph_break,
    },
    _SHAPES: {
        "GuardOnDataDependentSymNode": type("GuardOnDataDependentSymNode", (RuntimeError,), {}),  # to be caught
        "is_nested_int": _is_nested_int,
        **{name: _of_a_bool(name) for name in _OF_CONDITIONS},
    },
    _CHECKPOINT: {},
    _STORAGE: {name: _calls(_STORAGE, name) for name in ("HuggingFaceStorageReader", "HuggingFaceStorageWriter")},
    _GET_ITEM: {"TransformGetItemToIndex": _calls(_GET_ITEM, "TransformGetItemToIndex")},
}
"""Module -> the names that it has before it is loaded."""

# One for all, and one that its holder may take again: a module may load another.
_LOADING = threading.RLock()


class _Later(ModuleType):
    """A module that is not loaded yet, or is being loaded."""

    def __getattribute__(self, name: str) -> Any:
        own = ModuleType.__getattribute__(self, "__dict__")
        if name in _OF_EVERY_MODULE:
            return ModuleType.__getattribute__(self, name)
        spec = own["__spec__"]
        if isinstance(spec.loader, _Loader):
            if name in DEFERRED[spec.name]:
                return DEFERRED[spec.name][name]
            if f"{spec.name}.{name}" in DEFERRED and name in own:
                return own[name]
        _load(self)
        return ModuleType.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OF_EVERY_MODULE and not isinstance(value, ModuleType):  # a module: by the import system
            _load(self)
        ModuleType.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        _load(self)
        ModuleType.__delattr__(self, name)

    def __dir__(self) -> list[str]:
        _load(self)
        return list(ModuleType.__dir__(self))


class _Around(Loader):
    """A loader that does something else when a module is to be executed."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self.real.create_module(spec)
        return made

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)  # sources and other files


class _Loader(_Around):
    """Stands in for the real loader until the module is needed."""

    def exec_module(self, module: ModuleType) -> None:
        module.__class__ = _Later
        spec = module.__spec__
        places = spec.submodule_search_locations if spec else None
        for name in DEFERRED:  # what is deferred within a package is there before the package is loaded
            parent, _, child = name.rpartition(".")
            if parent == module.__name__ and name not in sys.modules:
                inner = _Finder().find_spec(name, places)
                if inner is not None and inner.loader is not None:
                    later = module_from_spec(inner)
                    inner.loader.exec_module(later)
                    sys.modules[name] = vars(module)[child] = later


class _Known(Loader):
    """For a module that is already there."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


class _Finder(MetaPathFinder):
    """Finds what is deferred as Python would, and gives it our loader."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name in DEFERRED or name == _NAMES:
            spec = PathFinder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader) if name in DEFERRED else _Quicker(spec.loader)
            return spec
        package = name.rpartition(".")[0]
        if is_deferred(package):  # who wants what lies within it gets the package first, which may have loaded that
            _loaded(package)
            if name in sys.modules:  # taken out, or Python would execute it again; it puts it back
                return ModuleSpec(name, _Known(sys.modules.pop(name)))
        return None


class _Quicker(_Around):
    """Loads the module by which transformers looks what its files offer, and makes two functions of it quicker."""

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.real
        self.real.exec_module(module)
        for name, quicker in (("create_import_structure_from_path", _once_a_folder), ("fetch__all__", _from_the_last)):
            if name in vars(module):
                vars(module)[name] = quicker(vars(module)[name])


def _once_a_folder(look: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """transformers looks through its 1,600 model files twice: what it found it keeps by name, and it asks for the
    folder once by its own name and once by that of a file in it. Here it asks by one name."""
    if not hasattr(look, "cache_info"):  # it keeps nothing: then neither do we
        return look
    return lambda place: look(Path(place).parent if Path(place).is_file() else Path(place))


def _from_the_last(names_in: Callable[[str], list[str]]) -> Callable[[str], list[str]]:
    """It takes a file into lines, and reads from the last on that begins with ``__all__``: here it is given these."""
    return lambda content: names_in(content[max(content.rfind("\n__all__") + 1, 0) :])


def install() -> None:
    """Defers what is not imported yet, in this process. Repeating it changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def is_deferred(name: str) -> bool:
    """Whether a module is there, and not loaded yet."""
    return type(sys.modules.get(name)) is _Later


def is_loaded(name: str) -> bool:
    """Whether a module is there, and was loaded."""
    return name in sys.modules and not is_deferred(name)


def _loaded(name: str) -> ModuleType:
    module = import_module(name)
    _load(module)
    return module


def _load(module: ModuleType) -> None:
    """Executes a deferred module, once, after its package; other threads wait. A failure is raised each time."""
    with _LOADING:
        package = module.__name__.rpartition(".")[0]
        if is_deferred(package):
            _load(sys.modules[package])
        spec = module.__spec__
        if spec is None or not isinstance(spec.loader, _Loader):  # loaded, or asked for by what it imports itself
            return
        later = spec.loader
        spec.loader = module.__loader__ = later.real
        try:
            later.real.exec_module(module)
        except BaseException:
            spec.loader = module.__loader__ = later
            raise
        module.__class__ = ModuleType
        _hand_out(module)
        while module.__name__ == "torch._dynamo" and _AFTERWARDS:
            _AFTERWARDS.pop(0)()


def _hand_out(module: ModuleType) -> None:
    """Modules that imported names of a module before it was loaded get the real ones."""
    real = {id(stand_in): vars(module).get(name) for name, stand_in in DEFERRED[module.__name__].items()}
    for other in list(sys.modules.values()):
        names: Any = getattr(other, "__dict__", None)
        for name, value in list(names.items()) if isinstance(names, dict) else ():
            if real.get(id(value)) is not None and names is not vars(sys.modules[__name__]):
                names[name] = real[id(value)]
