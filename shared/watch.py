"""Who makes a step slow: lines that make the host wait for the device, functions that the input spends its time in.

Each class here watches a StepTimer: it is told "" when a step begins, and the name of every section when it ends. None
of them is in use while a run trains; `diagnose` runs a few steps under each.
"""

import site
import sys
import sysconfig
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_ROOT = Path(__file__).resolve().parents[1]
_OURS = tuple(str(_ROOT / name) + "/" for name in ("apps", "shared"))
_WATCHERS = (__file__, str(Path(__file__).with_name("timing.py")))
_LIBRARIES = tuple(
    str(Path(path)) + "/"
    for path in (
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        *site.getsitepackages(),
        site.getusersitepackages(),
        str(Path(torch.__file__).parent),
    )
)

# Operations whose result the host needs before it can go on: a number, or a size that depends on the values.
_WAITING = {
    "aten::_local_scalar_dense": "reads a number",
    "aten::equal": "compares tensors",
    "aten::nonzero": "finds nonzero elements",
    "aten::masked_select": "selects by a mask",
    "aten::_unique": "finds unique values",
    "aten::_unique2": "finds unique values",
    "aten::unique_dim": "finds unique values",
    "aten::unique_consecutive": "finds unique values",
}
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_")
_COPIES = ("aten::_to_copy", "aten::copy_")
# Methods that copy to the host, and on a CPU are no operation. (A .to() is: it names the device of the run there.)
_READERS = {Tensor.tolist: "copies to the host", Tensor.numpy: "copies to the host", Tensor.cpu: "copies to the host"}


class Place(NamedTuple):
    """A line of code, or a function where it begins."""

    file: str  # relative to the project, or as Python knows it
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.function} ({self.file}:{self.line})"


class HostRead(NamedTuple):
    """A line that makes the host wait for the device."""

    place: Place
    what: str  # "reads a number"
    per_step: float  # times a step


class HotFunction(NamedTuple):
    """A function of the project or of the user, with what the libraries do for it."""

    place: Place
    share: float  # of the watched section
    calls_per_step: float  # of functions, its own and the libraries', made from it


def is_own(filename: str) -> bool:
    """Whether a file belongs to the project or the user: not to Python, torch or another installed package."""
    if filename in _WATCHERS:
        return False
    return filename.startswith(_OURS) or not filename.startswith(("<", *_LIBRARIES))


def place_of(code: CodeType, line: int) -> Place:
    """The place to name to a user."""
    path = Path(code.co_filename)
    file = path.relative_to(_ROOT).as_posix() if path.is_relative_to(_ROOT) else code.co_filename
    return Place(file, line, code.co_qualname)


def own_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost frame, from this one outwards, whose code is the project's or the user's."""
    while frame is not None and not is_own(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


class HotFunctions:
    """Which functions the first section of each step, the input, spends its time in; by sys.setprofile.

    What a library does counts for the function that called it. Python calls this for every call and return, so that
    code of many small calls looks slower beside code of few large ones than it is.
    """

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[CodeType | None, float] = defaultdict(float)
        self._calls: Counter[CodeType | None] = Counter()
        self._is_own: dict[CodeType, bool] = {}
        self._owner: CodeType | None = None
        self._last = 0.0
        self._steps = 0
        self._before: Any = None

    def __call__(self, section: str) -> None:
        """Watches from the beginning of a step to its first mark."""
        if section == "":
            self._steps += 1
            self._before = sys.getprofile()
            self._owner = self._owner_of(sys._getframe(1))
            self._last = self._clock()
            sys.setprofile(self._event)
        elif sys.getprofile() == self._event:
            sys.setprofile(self._before)
            self._seconds[self._owner] += self._clock() - self._last

    def found(self) -> list[HotFunction]:
        """The functions, the hottest first."""
        total = sum(self._seconds.values())
        return [
            HotFunction(
                place_of(code, code.co_firstlineno),
                seconds / total if total else 0.0,
                self._calls[code] / max(self._steps, 1),
            )
            for code, seconds in sorted(self._seconds.items(), key=lambda item: item[1], reverse=True)
            if code is not None
        ]

    def _event(self, frame: FrameType, event: str, argument: object) -> None:
        now = self._clock()
        self._seconds[self._owner] += now - self._last
        if event in ("call", "c_call"):
            self._calls[self._owner] += 1
        if event == "call":
            self._owner = self._owner_of(frame)
        elif event == "return":
            self._owner = self._owner_of(frame.f_back)
        self._last = self._clock()

    def _owner_of(self, frame: FrameType | None) -> CodeType | None:
        while frame is not None:
            code = frame.f_code
            own = self._is_own.get(code)
            if own is None:
                own = self._is_own[code] = is_own(code.co_filename)
            if own:
                return code
            frame = frame.f_back
        return None


class HostReads:
    """Counts, line by line, what makes the host wait for the device; use as a context manager around the steps.

    On CUDA a tensor says itself where it is. On a CPU, where reading costs nothing, what would be on a device is told
    from the model: its weights (`roots`), what is computed from them, and what is computed with them. What the input
    does with its own tensors is none of that. Steps in which a read is due are told by end_of_step() and left out.
    """

    def __init__(self, device: torch.device, roots: Iterable[Tensor]) -> None:
        self._on_cuda = device.type == "cuda"
        self._roots = [_weak(t) for t in roots]
        self._on_device: dict[int, StorageWeakRef] = {}  # keeps the address of a freed storage from being used again
        self._step: Counter[tuple[Place, str]] = Counter()
        self._counts: Counter[tuple[Place, str]] = Counter()
        self._steps = 0
        self._all_steps = 0
        self._is_watching = False
        self._modes: list[Any] = [_Operations(self)]
        if not self._on_cuda:
            self._modes.append(_Methods(self))

    def __call__(self, section: str) -> None:
        """Begins to count where a step begins."""
        if section == "":
            self._is_watching = True
            self._on_device = {ref.cdata: ref for ref in self._roots}

    def end_of_step(self, is_due: bool) -> None:
        """Adds the step's reads to the sums, unless something was due in it."""
        self._is_watching = False
        self._all_steps += 1
        if not is_due:
            self._counts += self._step
            self._steps += 1
        self._step.clear()

    def found(self) -> list[HostRead]:
        """The lines that read, the most frequent first."""
        return [HostRead(place, what, n / self._steps) for (place, what), n in self._counts.most_common()]

    @property
    def always_due(self) -> bool:
        """Whether something was due in every step, so that nothing can be said."""
        return self._all_steps > 0 and self._steps == 0

    def __enter__(self) -> Self:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def is_on_device(self, tensor: Tensor) -> bool:
        """Whether reading this tensor would make the host wait."""
        if self._on_cuda or tensor.device.type == "cuda":
            return tensor.device.type == "cuda"
        return tensor.untyped_storage()._cdata in self._on_device

    def note(self, what: str) -> None:
        """Counts a read for the line under way."""
        frame = own_frame(sys._getframe(1)) if self._is_watching else None
        if frame is not None:
            self._step[place_of(frame.f_code, frame.f_lineno), what] += 1

    def spread(self, given: Iterable[Tensor], made: Iterable[Tensor]) -> None:
        """Remembers that what an operation on the device was given, numbers apart, and what it made is there too."""
        for tensor in (*(t for t in given if t.ndim), *made):
            if tensor.untyped_storage()._cdata not in self._on_device:
                reference = _weak(tensor)
                self._on_device[reference.cdata] = reference


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own hooks have no types
    """Sees every operation of torch, those of backward included."""

    def __init__(self, reads: HostReads) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        is_there = any(map(self._reads.is_on_device, given))
        what = _why_it_waits(func, args, kwargs) if is_there else None
        if what is not None:
            self._reads.note(what)
        made = func(*args, **kwargs)
        if is_there and not self._reads._on_cuda:
            self._reads.spread(given, _tensors(made))
        return made


class _Methods(TorchFunctionMode):
    """Sees the methods that copy to the host, which on a CPU are no operations."""

    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        what = _READERS.get(func)
        if what is None or not self._reads.is_on_device(args[0]):
            return func(*args, **kwargs)
        self._reads.note(what)
        before, self._reads._is_watching = self._reads._is_watching, False  # a number's tolist() is also an item()
        try:
            return func(*args, **kwargs)
        finally:
            self._reads._is_watching = before


def _weak(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _why_it_waits(func: Any, args: Any, kwargs: Any) -> str | None:
    """What the host waits for in an operation on the device; None where it does not wait."""
    name = func.name().partition(".")[0]
    if name in _WAITING:
        return _WAITING[name]
    if name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
        return "repeats by counts, of unknown sum"
    if name in _INDEXING and any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1])):
        return "selects by a mask"
    if name in _COPIES:
        source = args[0] if name == "aten::_to_copy" else args[1]
        target = kwargs.get("device", source.device) if name == "aten::_to_copy" else args[0].device
        if source.device.type == "cuda" and target is not None and torch.device(target).type == "cpu":
            return "copies to the host"
    return None


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class Ranges:
    """Puts every section into a range of its own name, by `push` and `pop`.

    A range must be named when it begins, and a section is named when it ends; so each step takes the names of the step
    before it. In the first one there are no ranges, and a section that the step before did not have is called "other".
    """

    def __init__(self, push: Callable[[str], object], pop: Callable[[], object]) -> None:
        self._push = push
        self._pop = pop
        self._names: list[str] = []  # of the step before
        self._step: list[str] = []
        self._is_open = False

    def __call__(self, section: str) -> None:
        """Ends the range under way and begins the next."""
        if self._is_open:
            self._pop()
            self._is_open = False
        if section == "":
            self._names, self._step = self._step, []
        else:
            self._step.append(section)
        if self._names and section != "other":
            place = len(self._step)
            if self._step != self._names[:place]:  # goes on behind the last section that both steps have
                place = max((i + 1 for i, name in enumerate(self._names) if name == section), default=len(self._names))
            self._push(self._names[place] if place < len(self._names) else "other")
            self._is_open = True


def nvtx_ranges() -> Ranges:
    """Ranges for nsys; needs CUDA."""
    return Ranges(torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop)


def profiler_ranges() -> Ranges:
    """Ranges for torch.profiler."""
    under_way: list[Any] = []

    def push(name: str) -> None:
        under_way.append(torch.profiler.record_function(name))
        under_way[-1].__enter__()

    return Ranges(push, lambda: under_way.pop().__exit__(None, None, None))
