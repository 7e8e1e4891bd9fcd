"""Rules of the tree, read from the syntax of the code: who may import whom, and what nobody may write.

A rule is a function of a tree (path -> syntax) that returns one line per fault. Every rule runs on the real tree and on
small bad ones, so that it is known to be able to fail, and on near misses, so that it is known not to cry wolf.
"""

import ast
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

Tree = Mapping[str, ast.Module]  # "shared/seed.py" -> its syntax
Rule = Callable[[Tree], list[str]]

# A module of shared imports lower levels only; those of level 0 may also import one another where they need it.
LEVELS = {
    **dict.fromkeys(
        ("seed", "device", "negatives", "pk_sampler", "ranking", "schedule", "config", "files", "pickles", "compat"), 0
    ),
    **dict.fromkeys(("faults", "tokens", "packs", "clcrec_folder"), 0),  # what readers of sources share
    **dict.fromkeys(("loaders", "amp", "log", "checkpoint", "distributed", "timing", "ladder"), 1),
    **dict.fromkeys(("progress", "cli", "report"), 2),  # report reads what log and timing have written
    # watch tells who makes a step slow, trials compare configurations, the last two ask them what the user asked
    "watch": 0,
    "trials": 2,
    "diagnosis": 3,
    "tuning": 3,
}

RUN_TIME_PACKAGES = {"torch", "typer", "rich", "safetensors", "yaml"}
# Packages of the extras, and what needs them without saying so: only in these modules, and only inside a function.
EXTRA_PACKAGES = ("numpy", "PIL", "tensorboard", "torch.utils.tensorboard", "safetensors.numpy")
EXTRAS_ALLOWED = {"shared/log.py": ("torch.utils.tensorboard",), "apps/reid/images.py": ("PIL",)}
TERMINAL_PACKAGES = ("typer", "rich")
TORCH_LOADERS = ("torch", "safetensors.torch", "tensorboard")  # importing one of these imports torch: two seconds

ONLY_IN_TORCH_2_13 = {
    "linear_cross_entropy",
    "LinearCrossEntropyOptions",
    "all_gather_single",
    "reduce_scatter_single",
}

# What a module of an app must not reach through other modules of that app.
_JOINED_BY_TRAIN = {"dataset", "model", "losses"}
_UPPER = {"__main__", "main", "train", "evaluate", "bench", "diagnose"}
MUST_NOT_REACH = {
    "dataset": {"model", "losses", "formats", "demo"} | _UPPER,
    "model": {"dataset", "losses", "formats", "demo"} | _UPPER,
    "losses": {"dataset", "model", "formats", "demo"} | _UPPER,
    "formats": {"model", "losses"} | _UPPER,
    "demo": {"model", "losses"} | _UPPER,
    "train": {"originals", "bench"},  # the slow arrangements are for comparison only
    "evaluate": {"originals", "bench"},
}

BANNED_NAMES = {
    "eval": "parse the value instead",
    "exec": "write a function instead",
    "os.rename": "use shared.files.replace, which works on Windows too",
    "os.renames": "use shared.files.replace, which works on Windows too",
    "torch.cuda.amp": "use torch.amp with a device type",
    "torch.cpu.amp": "use torch.amp with a device type",
    **dict.fromkeys(
        ("_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"),
        "use shared.files, which reads plain data only",
    ),
    **dict.fromkeys(  # of pickle itself only its errors are welcome: torch.load raises them
        (f"pickle.{name}" for name in ("load", "loads", "Unpickler", "_Unpickler", "dump", "dumps", "Pickler")),
        "use shared.files, which reads plain data only",
    ),
}

MAIN_LINES = 8  # of code in an app's __main__.py


# Reading the tree


@dataclass(frozen=True)
class Import:
    """One imported name, in full: "shared.seed.fold" for `from shared.seed import fold`."""

    line: int
    target: str
    is_lazy: bool  # inside a function
    is_for_types: bool  # under `if TYPE_CHECKING`


def real_tree() -> Tree:
    """The syntax of every module of apps and shared."""
    paths = sorted(path for top in ("apps", "shared") for path in (ROOT / top).rglob("*.py"))
    return parsed({path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths})


def parsed(sources: Mapping[str, str]) -> Tree:
    return {path: ast.parse(text, filename=path) for path, text in sources.items()}


def module_name(path: str) -> str:
    """apps/seqrec/train.py -> apps.seqrec.train; a package has the name of its folder."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: str, module: ast.Module) -> list[Import]:
    """Everything a module imports, at any depth; relative imports and literal import_module calls included."""
    package = module_name(path) if path.endswith("/__init__.py") else module_name(path).rpartition(".")[0]
    return list(_imports(module, package, is_lazy=False, is_for_types=False))


def _imports(node: ast.AST, package: str, *, is_lazy: bool, is_for_types: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(node.lineno, alias.name, is_lazy, is_for_types)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parent = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*parent, base] if base else parent)
        for alias in node.names:
            yield Import(node.lineno, f"{base}.{alias.name}", is_lazy, is_for_types)
    elif isinstance(node, ast.Call) and _last_name(node.func) in ("import_module", "__import__"):
        for name in node.args[:1]:
            if isinstance(name, ast.Constant):
                yield Import(node.lineno, str(name.value), is_lazy, is_for_types)
    for field, value in ast.iter_fields(node):
        lazy = is_lazy or (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and field == "body")
        types = is_for_types or (isinstance(node, ast.If) and field == "body" and _is_type_checking(node.test))
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _imports(child, package, is_lazy=lazy, is_for_types=types)


def _is_type_checking(test: ast.expr) -> bool:
    return _last_name(test) == "TYPE_CHECKING"


def _last_name(node: ast.AST) -> str:
    """The name, or the last part of a dotted one; empty for anything else."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def is_within(name: str, packages: Sequence[str]) -> bool:
    """Whether a dotted name is one of the packages or below one."""
    return any(name == package or name.startswith(package + ".") for package in packages)


def own_modules(tree: Tree) -> dict[str, str]:
    """Path of every module of the tree by its dotted name."""
    return {module_name(path): path for path in tree}


def own_module(target: str, known: Mapping[str, str]) -> str | None:
    """The module of the tree that an imported name belongs to; None where it belongs to none."""
    parts = target.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in names if name in known), None)


def own_arrows(tree: Tree) -> dict[str, set[str]]:
    """The modules of the tree that each of them imports, itself left out; lazy imports and those for types included."""
    known = own_modules(tree)
    arrows: dict[str, set[str]] = {}
    for name, path in known.items():
        targets = {own_module(item.target, known) for item in imports(path, tree[path])}
        arrows[name] = {to for to in targets if to is not None and to != name}
    return arrows


def aliases(path: str, module: ast.Module) -> dict[str, str]:
    """Full name by local name, of everything imported anywhere in the module."""
    package = module_name(path).rpartition(".")[0]
    found: dict[str, str] = {}
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or package)
            for alias in node.names:
                found[alias.asname or alias.name] = f"{base}.{alias.name}"
    return found


def full_name(node: ast.AST, local: Mapping[str, str]) -> str | None:
    """The dotted name an expression stands for, seen through the module's imports; None for other expressions."""
    if isinstance(node, ast.Name):
        return local.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = full_name(node.value, local)
        return f"{base}.{node.attr}" if base else None
    return None


def uses(path: str, module: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, full name) of every import and of every name or attribute that is read or called."""
    local = aliases(path, module)
    for item in imports(path, module):
        yield item.line, item.target
    for node in ast.walk(module):
        if isinstance(node, ast.Name | ast.Attribute):
            name = full_name(node, local)
            if name is not None:
                yield node.lineno, name


def app_of(name: str) -> str | None:
    """seqrec for apps.seqrec and what is below it; None outside the apps."""
    parts = name.split(".")
    return parts[1] if parts[0] == "apps" and len(parts) > 1 else None


def in_app(path: str) -> str | None:
    """train for apps/seqrec/train.py; None for what is no module of an app."""
    parts = path.removesuffix(".py").split("/")
    return ".".join(parts[2:]) if parts[0] == "apps" and len(parts) > 2 else None


# Rules: imports


def apps_stand_alone(tree: Tree) -> list[str]:
    """No app imports another app, nor the folder that holds them."""
    return [
        f"{path}:{item.line}: imports {item.target}; apps never import one another: copy it, or bring it to shared"
        for path, module in tree.items()
        if path.startswith("apps/")
        for item in imports(path, module)
        if item.target.split(".")[0] == "apps" and app_of(item.target) != app_of(module_name(path))
    ]


def shared_knows_no_app(tree: Tree) -> list[str]:
    """shared never imports an app."""
    return [
        f"{path}:{item.line}: imports {item.target}; shared never imports an app"
        for path, module in tree.items()
        if path.startswith("shared/")
        for item in imports(path, module)
        if item.target.split(".")[0] == "apps"
    ]


def every_shared_module_has_a_level(tree: Tree) -> list[str]:
    """Every module of shared stands in LEVELS."""
    return [
        f"{path}:1: has no level; add it to LEVELS in tests/test_architecture.py, if it may enter shared at all"
        for path in tree
        if path.startswith("shared/") and path != "shared/__init__.py" and _level(module_name(path)) is None
    ]


def levels_hold(tree: Tree) -> list[str]:
    """A module of shared imports lower levels only; level 0 also its own."""
    known = own_modules(tree)
    faults = []
    for path, module in tree.items():
        level = _level(module_name(path))
        for item in imports(path, module):
            below = _level(own_module(item.target, known) or "")
            if level is None or below is None or below < level or below == level == 0:
                continue
            faults.append(f"{path}:{item.line}: level {level} imports {item.target} of level {below}")
    return faults


def _level(module: str) -> int | None:
    package, _, name = module.partition(".")
    return LEVELS.get(name) if package == "shared" else None


def no_import_cycles(tree: Tree) -> list[str]:
    """No module imports itself by way of others, lazily or for its types included."""
    known = own_modules(tree)
    arrows = own_arrows(tree)
    faults = []
    for name, path in known.items():
        way = _way(name, name, arrows)
        if way and name == min(way):  # told once, by its first module
            faults.append(f"{path}:1: imports itself: {' -> '.join(way)}")
    return faults


def _way(start: str, goal: str, arrows: Mapping[str, set[str]]) -> list[str]:
    """The shortest chain of at least one arrow from start to goal; empty where there is none."""
    queue: list[list[str]] = [[start]]
    visited: set[str] = set()
    for chain in queue:
        for to in sorted(arrows[chain[-1]]):
            if to == goal:
                return [*chain, to]
            if to not in visited:
                visited.add(to)
                queue.append([*chain, to])
    return []


def terminal_packages_stay_outside(tree: Tree) -> list[str]:
    """typer and rich only in shared/cli.py, shared/progress.py and the apps' main.py."""
    return [
        f"{path}:{item.line}: imports {item.target}; only shared/cli.py, shared/progress.py and apps/*/main.py may"
        for path, module in tree.items()
        if path not in ("shared/cli.py", "shared/progress.py") and in_app(path) != "main"
        for item in imports(path, module)
        if is_within(item.target, TERMINAL_PACKAGES)
    ]


def few_packages_at_run_time(tree: Tree) -> list[str]:
    """The standard library, the run-time packages, our own; packages of the extras only where EXTRAS_ALLOWED says."""
    allowed = RUN_TIME_PACKAGES | {"apps", "shared"} | sys.stdlib_module_names
    faults = []
    for path, module in tree.items():
        for item in imports(path, module):
            if is_within(item.target, EXTRA_PACKAGES):
                if not is_within(item.target, EXTRAS_ALLOWED.get(path, ())):
                    faults.append(f"{path}:{item.line}: imports {item.target}; EXTRAS_ALLOWED does not list it here")
                elif not item.is_lazy:
                    faults.append(
                        f"{path}:{item.line}: imports {item.target} outside a function; an extra may be absent"
                    )
            elif item.target.split(".")[0] not in allowed:
                faults.append(f"{path}:{item.line}: imports {item.target}, which requirements.txt does not promise")
    return faults


def arrows_inside_an_app_point_down(tree: Tree) -> list[str]:
    """__main__ -> main -> the rest; what train joins stays apart (MUST_NOT_REACH); config needs nothing of its app."""
    known = own_modules(tree)
    arrows = own_arrows(tree)
    faults = []
    for name, path in known.items():
        app, part = app_of(name), in_app(path)
        if app is None or part is None:
            continue
        forbidden = {f"apps.{app}.{other}" for other in MUST_NOT_REACH.get(part, set())}
        if part == "config":
            forbidden = {other for other in known if app_of(other) == app and other not in (name, f"apps.{app}")}
        for goal in sorted(forbidden):
            way = _way(name, goal, arrows)
            if way:
                faults.append(f"{path}:1: must not depend on {goal}: {' -> '.join(way)}")
        top = {f"apps.{app}.__main__"} | ({f"apps.{app}.main"} if part != "__main__" else set())
        faults += [f"{path}:1: imports {goal}, which stands above it" for goal in sorted(top) if goal in arrows[name]]
    return faults


def help_stays_fast(tree: Tree) -> list[str]:
    """Importing an app's main or config, or shared's config or schedule, does not import torch.

    For the main module and what it imports this holds at module level; the other three never import torch themselves.
    """
    known = own_modules(tree)
    faults = []
    for path, module in tree.items():
        is_pure = path in ("shared/config.py", "shared/schedule.py") or in_app(path) == "config"
        if not is_pure and in_app(path) != "main":
            continue
        for item in imports(path, module):
            if item.is_for_types or (item.is_lazy and not is_pure):
                continue
            if is_within(item.target, TORCH_LOADERS):
                faults.append(f"{path}:{item.line}: imports {item.target}; --help would have to wait for torch")
                continue
            start = own_module(item.target, known)
            way = _way_to_torch(start, tree, known) if start else []
            if way:
                faults.append(f"{path}:{item.line}: --help would have to wait for torch: {' -> '.join(way)}")
    return faults


def _way_to_torch(start: str, tree: Tree, known: Mapping[str, str]) -> list[str]:
    """The chain of module-level imports from start to torch; empty where there is none."""
    queue, visited = [[start]], {start}
    for chain in queue:
        path = known[chain[-1]]
        for item in imports(path, tree[path]):
            if item.is_lazy or item.is_for_types:
                continue
            if is_within(item.target, TORCH_LOADERS):
                return [*chain, item.target]
            to = own_module(item.target, known)
            if to is not None and to not in visited:
                visited.add(to)
                queue.append([*chain, to])
    return []


# Rules: what a file may hold


def main_files_define_nothing(tree: Tree) -> list[str]:
    """An app's __main__.py imports main and calls main.app(): no definition, no assignment, a handful of lines."""
    faults = []
    for path, module in tree.items():
        if in_app(path) != "__main__":
            continue
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
                faults.append(f"{path}:{node.lineno}: defines something; it belongs into main.py")
            elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr):
                faults.append(f"{path}:{node.lineno}: assigns a name; it belongs into main.py")
        name = f"{module_name(path).removesuffix('.__main__')}.main.app"
        local = aliases(path, module)
        called = [full_name(node.func, local) for node in ast.walk(module) if isinstance(node, ast.Call)]
        if called != [name]:
            faults.append(f"{path}:1: must make one call, that of {name}; makes {called}")
        code = [node.lineno for node in ast.walk(module) if isinstance(node, ast.stmt)]
        if len(set(code)) > MAIN_LINES:
            faults.append(f"{path}:1: has {len(set(code))} lines of code; at most {MAIN_LINES}")
    return faults


def packages_hold_one_docstring(tree: Tree) -> list[str]:
    """Every __init__.py is one docstring: importing a module runs nothing else."""
    return [
        f"{path}:1: must hold one docstring and nothing else"
        for path, module in tree.items()
        if path.endswith("/__init__.py") and not (len(module.body) == 1 and ast.get_docstring(module))
    ]


def newest_torch_stays_in_compat(tree: Tree) -> list[str]:
    """Names that only torch 2.13 has stand in shared/compat.py alone; as text for getattr they count too."""
    faults = []
    for path, module in tree.items():
        if path == "shared/compat.py":
            continue
        found = {(line, name.rpartition(".")[2]) for line, name in uses(path, module)}
        found |= {
            (node.lineno, node.value)
            for node in ast.walk(module)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        found |= {(node.lineno, node.attr) for node in ast.walk(module) if isinstance(node, ast.Attribute)}
        faults += [
            f"{path}:{line}: {name} exists only in torch 2.13; reach it through shared/compat.py"
            for line, name in sorted(found)
            if name in ONLY_IN_TORCH_2_13
        ]
    return faults


def banned_names_are_absent(tree: Tree) -> list[str]:
    """No eval, exec, pickling, os.rename or torch.cuda.amp, under whatever local name."""
    faults = {
        f"{path}:{line}: uses {banned}; {repair}"
        for path, module in tree.items()
        for line, name in uses(path, module)
        for banned, repair in BANNED_NAMES.items()
        if is_within(name, (banned,))
    }
    return sorted(faults)


def files_are_replaced_not_renamed(tree: Tree) -> list[str]:
    """No call of a method rename: that of Path fails on Windows where the target exists."""
    return [
        f"{path}:{node.lineno}: calls rename; use shared.files.replace, which works on Windows too"
        for path, module in tree.items()
        for node in ast.walk(module)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "rename"
    ]


def torch_loads_weights_only(tree: Tree) -> list[str]:
    """Every torch.load says weights_only=True itself."""
    faults = []
    for path, module in tree.items():
        local = aliases(path, module)
        for node in ast.walk(module):
            if not isinstance(node, ast.Call) or full_name(node.func, local) != "torch.load":
                continue
            if not any(word.arg == "weights_only" and _is_true(word.value) for word in node.keywords):
                faults.append(f"{path}:{node.lineno}: torch.load without weights_only=True runs what the file says")
    return faults


def graphs_are_not_retained(tree: Tree) -> list[str]:
    """No retain_graph=True: it hides a second backward through the same graph."""
    return [
        f"{path}:{node.value.lineno}: retain_graph=True keeps a graph that nobody should need twice"
        for path, module in tree.items()
        for node in ast.walk(module)
        if isinstance(node, ast.keyword) and node.arg == "retain_graph" and _is_true(node.value)
    ]


def _is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def no_broad_except(tree: Tree) -> list[str]:
    """No handler that swallows everything; one that cleans up and ends in a bare `raise` hides nothing."""
    faults = []
    for path, module in tree.items():
        for node in ast.walk(module):
            if isinstance(node, ast.ExceptHandler):
                ends_in_raise = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
                if _is_broad(node.type) and not ends_in_raise:
                    faults.append(f"{path}:{node.lineno}: catches everything; name the errors that can be repaired")
            elif isinstance(node, ast.Call) and _last_name(node.func) == "suppress" and any(map(_is_broad, node.args)):
                faults.append(f"{path}:{node.lineno}: suppresses everything; name the errors that may be ignored")
    return faults


def _is_broad(node: ast.expr | None) -> bool:
    if isinstance(node, ast.Tuple):
        return any(map(_is_broad, node.elts))
    return node is None or _last_name(node) in ("Exception", "BaseException")


RULES: tuple[Rule, ...] = (
    apps_stand_alone,
    shared_knows_no_app,
    every_shared_module_has_a_level,
    levels_hold,
    no_import_cycles,
    terminal_packages_stay_outside,
    few_packages_at_run_time,
    arrows_inside_an_app_point_down,
    help_stays_fast,
    main_files_define_nothing,
    packages_hold_one_docstring,
    newest_torch_stays_in_compat,
    banned_names_are_absent,
    files_are_replaced_not_renamed,
    torch_loads_weights_only,
    graphs_are_not_retained,
    no_broad_except,
)

# rule, what is in the tree, where its one fault is
BAD: tuple[tuple[Rule, dict[str, str], str], ...] = (
    (apps_stand_alone, {"apps/a/train.py": "import torch\nfrom apps.b.model import Net\n"}, "apps/a/train.py:2"),
    (apps_stand_alone, {"apps/a/train.py": "from apps import b\n"}, "apps/a/train.py:1"),
    (apps_stand_alone, {"apps/a/train.py": "from ..b import model\n"}, "apps/a/train.py:1"),
    (apps_stand_alone, {"apps/a/train.py": "def f():\n    import apps.b\n"}, "apps/a/train.py:2"),
    (
        apps_stand_alone,
        {"apps/a/train.py": "import importlib\nimportlib.import_module('apps.b')\n"},
        "apps/a/train.py:2",
    ),
    (apps_stand_alone, {"apps/a/train.py": "import apps\n"}, "apps/a/train.py:1"),
    (shared_knows_no_app, {"shared/seed.py": "def f():\n    from apps.a import model\n"}, "shared/seed.py:2"),
    (every_shared_module_has_a_level, {"shared/tools.py": ""}, "shared/tools.py:1"),
    (every_shared_module_has_a_level, {"shared/io/seed.py": ""}, "shared/io/seed.py:1"),
    (levels_hold, {"shared/seed.py": "from shared.log import due\n", "shared/log.py": ""}, "shared/seed.py:1"),
    (levels_hold, {"shared/amp.py": "from shared import log\n", "shared/log.py": ""}, "shared/amp.py:1"),
    (levels_hold, {"shared/amp.py": "from . import cli\n", "shared/cli.py": ""}, "shared/amp.py:1"),
    (levels_hold, {"shared/cli.py": "import shared.progress\n", "shared/progress.py": ""}, "shared/cli.py:1"),
    (
        no_import_cycles,
        {"shared/seed.py": "from shared import files\n", "shared/files.py": "def f():\n    import shared.seed\n"},
        "shared/files.py:1",
    ),
    (
        no_import_cycles,
        {
            "apps/a/x.py": "from apps.a.y import f\n",
            "apps/a/y.py": "from .z import f\n",
            "apps/a/z.py": "from apps.a import x\n",
        },
        "apps/a/x.py:1",
    ),
    (terminal_packages_stay_outside, {"apps/a/train.py": "from rich.console import Console\n"}, "apps/a/train.py:1"),
    (terminal_packages_stay_outside, {"shared/log.py": "def f():\n    import typer\n"}, "shared/log.py:2"),
    (few_packages_at_run_time, {"apps/a/dataset.py": "import pandas as pd\n"}, "apps/a/dataset.py:1"),
    (few_packages_at_run_time, {"apps/a/dataset.py": "def f():\n    import numpy\n"}, "apps/a/dataset.py:2"),
    (few_packages_at_run_time, {"shared/log.py": "import torch.utils.tensorboard\n"}, "shared/log.py:1"),
    (
        few_packages_at_run_time,
        {"apps/a/train.py": "def f():\n    from torch.utils import tensorboard\n"},
        "apps/a/train.py:2",
    ),
    (few_packages_at_run_time, {"shared/files.py": "from safetensors import numpy\n"}, "shared/files.py:1"),
    (
        arrows_inside_an_app_point_down,
        {"apps/a/model.py": "from apps.a.dataset import Batch\n", "apps/a/dataset.py": ""},
        "apps/a/model.py:1",
    ),
    (
        arrows_inside_an_app_point_down,
        {
            "apps/a/losses.py": "from apps.a import helper\n",
            "apps/a/helper.py": "from apps.a.train import fit\n",
            "apps/a/train.py": "",
        },
        "apps/a/losses.py:1",
    ),
    (
        arrows_inside_an_app_point_down,
        {"apps/a/dataset.py": "from .formats import read\n", "apps/a/formats.py": ""},
        "apps/a/dataset.py:1",
    ),
    (
        arrows_inside_an_app_point_down,
        {"apps/a/config.py": "from apps.a import tables\n", "apps/a/tables.py": ""},
        "apps/a/config.py:1",
    ),
    (
        arrows_inside_an_app_point_down,
        {"apps/a/train.py": "from apps.a.main import app\n", "apps/a/main.py": ""},
        "apps/a/train.py:1",
    ),
    (
        arrows_inside_an_app_point_down,
        {"apps/a/main.py": "import apps.a.__main__\n", "apps/a/__main__.py": ""},
        "apps/a/main.py:1",
    ),
    (help_stays_fast, {"apps/a/main.py": "import typer\nfrom torch import Tensor\n"}, "apps/a/main.py:2"),
    (help_stays_fast, {"apps/a/config.py": "def f():\n    import torch\n"}, "apps/a/config.py:2"),
    (help_stays_fast, {"shared/schedule.py": "from safetensors.torch import load\n"}, "shared/schedule.py:1"),
    (
        help_stays_fast,
        {
            "apps/a/main.py": "from shared import cli\n",
            "shared/cli.py": "from shared.files import replace\n",
            "shared/files.py": "import torch\n",
        },
        "apps/a/main.py:1",
    ),
    (
        help_stays_fast,
        {"shared/config.py": "def f():\n    from shared.seed import fold\n", "shared/seed.py": "import torch\n"},
        "shared/config.py:2",
    ),
    (
        main_files_define_nothing,
        {"apps/a/__main__.py": "from apps.a import main\ndef go():\n    main.app()\n"},
        "apps/a/__main__.py:2",
    ),
    (
        main_files_define_nothing,
        {"apps/a/__main__.py": "from apps.a import main\nx = main.app()\n"},
        "apps/a/__main__.py:2",
    ),
    (
        main_files_define_nothing,
        {"apps/a/__main__.py": "from apps.a import main\nmain.other()\n"},
        "apps/a/__main__.py:1",
    ),
    (main_files_define_nothing, {"apps/a/__main__.py": "from apps.a import main\n"}, "apps/a/__main__.py:1"),
    (
        main_files_define_nothing,
        {"apps/a/__main__.py": "import os\n" * MAIN_LINES + "from apps.a import main\nmain.app()\n"},
        "apps/a/__main__.py:1",
    ),
    (
        packages_hold_one_docstring,
        {"apps/a/__init__.py": '"""An app."""\nfrom apps.a import model\n'},
        "apps/a/__init__.py:1",
    ),
    (packages_hold_one_docstring, {"shared/__init__.py": ""}, "shared/__init__.py:1"),
    (
        newest_torch_stays_in_compat,
        {"apps/a/losses.py": "import torch.nn.functional as F\nx = F.linear_cross_entropy\n"},
        "apps/a/losses.py:2",
    ),
    (
        newest_torch_stays_in_compat,
        {"shared/distributed.py": "from torch.distributed import all_gather_single as g\n"},
        "shared/distributed.py:1",
    ),
    (
        newest_torch_stays_in_compat,
        {"apps/a/losses.py": "f = getattr(F, 'linear_cross_entropy', None)\n"},
        "apps/a/losses.py:1",
    ),
    (newest_torch_stays_in_compat, {"apps/a/losses.py": "f = g().reduce_scatter_single\n"}, "apps/a/losses.py:1"),
    (banned_names_are_absent, {"apps/a/train.py": "x = eval('1')\n"}, "apps/a/train.py:1"),
    (banned_names_are_absent, {"apps/a/train.py": "exec('x = 1')\n"}, "apps/a/train.py:1"),
    (banned_names_are_absent, {"apps/a/dataset.py": "from pickle import load as read\n"}, "apps/a/dataset.py:1"),
    (banned_names_are_absent, {"shared/files.py": "def f():\n    import marshal\n"}, "shared/files.py:2"),
    (banned_names_are_absent, {"shared/files.py": "import os as o\no.rename('a', 'b')\n"}, "shared/files.py:2"),
    (banned_names_are_absent, {"shared/amp.py": "from torch.cuda.amp import autocast\n"}, "shared/amp.py:1"),
    (banned_names_are_absent, {"shared/amp.py": "import torch\nx = torch.cuda.amp\n"}, "shared/amp.py:2"),
    (files_are_replaced_not_renamed, {"shared/files.py": "def f(p):\n    p.rename('b')\n"}, "shared/files.py:2"),
    (torch_loads_weights_only, {"shared/files.py": "import torch\ntorch.load('x')\n"}, "shared/files.py:2"),
    (
        torch_loads_weights_only,
        {"shared/files.py": "import torch as t\nt.load('x', weights_only=False)\n"},
        "shared/files.py:2",
    ),
    (torch_loads_weights_only, {"shared/files.py": "from torch import load\nload('x')\n"}, "shared/files.py:2"),
    (graphs_are_not_retained, {"apps/a/train.py": "loss.backward(retain_graph=True)\n"}, "apps/a/train.py:1"),
    (no_broad_except, {"apps/a/train.py": "try:\n    f()\nexcept Exception:\n    pass\n"}, "apps/a/train.py:3"),
    (no_broad_except, {"apps/a/train.py": "try:\n    f()\nexcept:\n    g()\n"}, "apps/a/train.py:3"),
    (
        no_broad_except,
        {"apps/a/train.py": "try:\n    f()\nexcept (OSError, BaseException) as e:\n    raise X from e\n"},
        "apps/a/train.py:3",
    ),
    (
        no_broad_except,
        {"apps/a/train.py": "import contextlib\nwith contextlib.suppress(Exception):\n    f()\n"},
        "apps/a/train.py:2",
    ),
)

# rule, what is in the tree: close to a fault, and none
GOOD: tuple[tuple[Rule, dict[str, str]], ...] = (
    (apps_stand_alone, {"apps/a/train.py": "from apps.a import model\nfrom . import losses\nimport shared.amp\n"}),
    (shared_knows_no_app, {"shared/cli.py": "from shared import config\napps = 'apps.seqrec'\n"}),
    (every_shared_module_has_a_level, {"shared/__init__.py": "", "shared/seed.py": "", "apps/a/tools.py": ""}),
    (levels_hold, {"shared/cli.py": "from shared import config\n", "shared/config.py": ""}),
    (levels_hold, {"shared/files.py": "from shared import seed\n", "shared/seed.py": ""}),
    (levels_hold, {"apps/a/train.py": "from shared import cli\n", "shared/cli.py": ""}),
    (
        no_import_cycles,
        {"apps/a/x.py": "from apps.a import y, z\n", "apps/a/y.py": "import apps.a.z\n", "apps/a/z.py": ""},
    ),
    (no_import_cycles, {"apps/a/__init__.py": "", "apps/a/x.py": "from apps.a.x import me\n"}),
    (terminal_packages_stay_outside, {"apps/a/main.py": "import typer\n", "shared/cli.py": "import rich.table\n"}),
    (few_packages_at_run_time, {"shared/log.py": "def f():\n    from torch.utils.tensorboard import SummaryWriter\n"}),
    (few_packages_at_run_time, {"shared/files.py": "import os.path, torch, yaml\nfrom safetensors import safe_open\n"}),
    (
        arrows_inside_an_app_point_down,
        {
            "apps/a/__init__.py": "",
            "apps/a/__main__.py": "from apps.a import main\n",
            "apps/a/main.py": "from apps.a import config, train\n",
            "apps/a/train.py": "from apps.a import config, dataset, evaluate, losses, model\n",
            "apps/a/evaluate.py": "from apps.a import dataset, model\n",
            "apps/a/formats.py": "from apps.a import dataset\n",
            "apps/a/demo.py": "from apps.a import dataset, formats\n",
            "apps/a/model.py": "from apps.a import config, blocks\n",
            "apps/a/blocks.py": "",
            "apps/a/dataset.py": "",
            "apps/a/losses.py": "",
            "apps/a/config.py": "from shared import config\n",
            "shared/config.py": "",
        },
    ),
    (
        help_stays_fast,
        {
            "apps/a/main.py": (
                "from typing import TYPE_CHECKING\nfrom shared import cli\nif TYPE_CHECKING:\n    import torch\n"
                "def train():\n    import torch\n    from apps.a import train\n"
            ),
            "apps/a/train.py": "import torch\n",
            "apps/a/config.py": "from shared.config import knob\n",
            "shared/config.py": "import yaml\n",
            "shared/cli.py": "def f():\n    import torch\n",
        },
    ),
    (
        main_files_define_nothing,
        {"apps/a/__main__.py": '"""Run."""\n\nfrom apps.a import main\n\nif __name__ == "__main__":\n    main.app()\n'},
    ),
    (main_files_define_nothing, {"apps/a/__main__.py": "from apps.a.main import app\napp(prog_name='a')\n"}),
    (packages_hold_one_docstring, {"shared/__init__.py": '"""One sentence."""\n'}),
    (newest_torch_stays_in_compat, {"shared/compat.py": "f = getattr(F, 'linear_cross_entropy', None)\n"}),
    (newest_torch_stays_in_compat, {"apps/a/losses.py": "from shared.compat import cross_entropy\n'all_gather'\n"}),
    (
        banned_names_are_absent,
        {"apps/a/train.py": "model.eval()\nself.exec = 1\nimport pickletools\nos.replace(a, b)\n"},
    ),
    (
        banned_names_are_absent,
        {"shared/amp.py": "import torch\ntorch.amp.autocast('cuda')\ntorch.cuda.synchronize()\n"},
    ),
    (
        banned_names_are_absent,
        {"shared/files.py": "import pickle\ntry:\n    f()\nexcept pickle.UnpicklingError:\n    pass\n"},
    ),
    (files_are_replaced_not_renamed, {"shared/files.py": "def f(p):\n    p.replace('b')\n"}),
    (
        torch_loads_weights_only,
        {"shared/files.py": "import json, torch\ntorch.load('x', weights_only=True)\njson.load(f)\n"},
    ),
    (graphs_are_not_retained, {"apps/a/train.py": "loss.backward(retain_graph=False)\n"}),
    (no_broad_except, {"apps/a/train.py": "try:\n    f()\nexcept (ValueError, OSError):\n    pass\n"}),
    (no_broad_except, {"apps/a/train.py": "try:\n    f()\nexcept BaseException:\n    g()\n    raise\n"}),
)


def name_of(value: object) -> str | None:
    return getattr(value, "__name__", "") or (value if isinstance(value, str) else "tree")


@pytest.fixture(scope="module")
def tree() -> Tree:
    return real_tree()


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_the_tree_keeps_the_rule(rule: Rule, tree: Tree):
    assert rule(tree) == []


def test_the_tree_is_read_whole(tree: Tree):
    assert {"apps/__init__.py", "apps/seqrec/train.py", "shared/config.py", "shared/amp.py"} <= set(tree)


@pytest.mark.parametrize(("rule", "sources", "place"), BAD, ids=name_of)
def test_the_rule_finds_the_fault(rule: Rule, sources: dict[str, str], place: str):
    faults = rule(parsed(sources))
    assert [fault.split(": ")[0] for fault in faults][:1] == [place]
    assert len({fault.split(": ")[0] for fault in faults}) == 1


@pytest.mark.parametrize(("rule", "sources"), GOOD, ids=name_of)
def test_the_rule_leaves_near_misses_alone(rule: Rule, sources: dict[str, str]):
    assert rule(parsed(sources)) == []


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_every_rule_is_known_to_fail_and_to_pass(rule: Rule):
    assert rule in [bad for bad, _, _ in BAD]
    assert rule in [good for good, _ in GOOD]
