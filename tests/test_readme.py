"""Every command in a ```bash block of a README is run here, shortened by flags, or the test says which one is not.

All shortened commands run one after the other in one process (importing torch takes seconds) and one empty folder, in
the order of TESTED: a command may use what an earlier one left behind. In a page, the word RUN stands for the name of a
run folder, as in `runs/seqrec/RUN`; here it is the newest one.
"""

import contextlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import traceback
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest

from apps.clcrec import demo
from apps.reid import demo as reid_demo
from apps.seqrec.contest_demo import write_contest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("apps/*/README.md"))]

# Command as the pages show it -> flags that make it short; in an order in which each finds what it needs. The number of
# epochs stays, so that the learning rate follows the documented schedule.
QUICK = "--max-steps 4"
QUICK_TINY = "--max-steps 4 --warmup-steps 0"  # the tiny file has fewer steps than the real one's warm-up
QUICK_FEW = "--max-steps 4 --num-negatives 8"  # the small folders have too few items for more
QUICK_ROWS = "--max-steps 4 --baselines popularity"  # the filter beside the model takes seconds
QUICK_SPEED = "--budget 0 --data-path Data/movielens --num-negatives 8"
QUICK_PAIR = "--max-steps 2 --warmup-steps 0 --identities-per-batch 2 --num-instances 2 --patch 16"  # of few people
QUICK_PEOPLE = f"{QUICK_PAIR} --data-path orbench.safetensors"  # drawing the demo's people takes seconds
QUICK_CLIP = (  # the real sizes, weights and vocabulary are too large to have here
    f"{QUICK_PAIR} --init none --vocab none --embed-dim 16 --tower-width 16 --tower-layers 1 --tower-heads 2 "
    "--text-width 16 --text-layers 1 --text-heads 2 --fusion-heads 2"
)
TESTED = {
    "python -m apps.seqrec train --norm-first": QUICK,
    "python -m apps.seqrec train --config fast": QUICK,
    "python -m apps.seqrec train --config default": f"{QUICK} --data-path ml-1m.txt",
    "python -m apps.seqrec --batch_size 128 --lr 0.001 --num_epochs 10 --hidden_units 128 --num_blocks 4": (
        f"{QUICK} --data-path ml-1m.txt"
    ),
    "python -m apps.seqrec train --data-path ml-1m.txt --max-len 200 --name first": QUICK,
    "python -m apps.seqrec train --config beauty --data-path Beauty.txt": QUICK_TINY,
    "python -m apps.seqrec check ml-1m.txt": "",
    "python -m apps.seqrec prepare ml-1m.txt ml-1m.safetensors": "",
    "python -m apps.seqrec train --config ml-1m --data-path ml-1m.txt": QUICK_TINY,
    "python -m apps.seqrec train --resume runs/seqrec/RUN": "",
    "python -m apps.seqrec evaluate runs/seqrec/RUN --protocol unfiltered": "",
    "python -m apps.seqrec evaluate runs/seqrec/RUN --protocol sampled": "",
    "python -m apps.seqrec predict runs/seqrec/RUN --k 10 --output predictions.jsonl": "",
    "python -m apps.seqrec predict runs/seqrec/RUN --k 20 --output top20.jsonl": "",
    "python -m apps.seqrec export model.safetensors --run runs/seqrec/RUN": "",
    "python -m benchmarks.seqrec_step --data-path ml-1m.txt": "--steps 1 --warm-up 1 --users 8 --max-len 20",
    "python -m torch.distributed.run --standalone --nproc-per-node 2 -m apps.seqrec train --data-path ml-1m.txt": QUICK,
    "python -m apps.seqrec check contest": "",
    "python -m apps.seqrec prepare contest contest-pack": "",
    "python -m apps.seqrec train --config taac --data-path contest-pack --name contest": QUICK_TINY,
    "python -m apps.seqrec predict runs/seqrec/RUN --k 10 --output top10.jsonl": "",
    "python -m apps.seqrec train --config taac --data-path contest-pack": QUICK_TINY,
    "python -m benchmarks.seqrec_ablation --folder contest-ablation": (
        "--users 40 --items 60 --epochs 1 --seeds 1 --only HSTU"
    ),
    "python -m apps.seqrec bench --quick": "--budget 0 --data-path ml-1m.txt --only input",
    "python -m apps.seqrec diagnose": "--budget 0 --data-path ml-1m.txt",
    "python -m apps.seqrec tune-speed": "--budget 0 --data-path ml-1m.txt",
    "python -m apps.clcrec train": QUICK,
    (
        "python -m apps.clcrec train --model_name='CLCRec' --l_r=0.001 --reg_weight=0.1 --num_workers=4 --num_neg=128 "
        "--batch_size=512 --has_a=True --has_t=True --has_v=True --lr_lambda=0.5 --temp_value=2.0 --num_sample=0.5"
    ): QUICK,
    "python -m apps.clcrec train --config default": QUICK,
    "python -m apps.clcrec train --config turbo": QUICK,
    "python -m apps.clcrec check Data/movielens": "",
    "python -m apps.clcrec prepare Data/movielens movielens.safetensors": "",
    "python -m apps.clcrec prepare ml-1m ml-1m-cold.safetensors --cold-share 0.2 --seed 42": "",
    "python -m apps.clcrec train --data-path Data/movielens --name first": QUICK_FEW,
    "python -m apps.clcrec train --config citeulike --data-path Data/citeulike": QUICK_FEW,
    "python -m apps.clcrec train --config movielens --data-path Data/movielens": QUICK_FEW,
    "python -m apps.clcrec train --resume runs/clcrec/RUN": "",
    "python -m apps.clcrec evaluate runs/clcrec/RUN": "",
    "python -m apps.clcrec predict runs/clcrec/RUN --k 20 --output top20.jsonl": "",
    "python -m apps.clcrec predict runs/clcrec/RUN --users-for cold --output users.jsonl": "",
    "python -m apps.clcrec predict runs/clcrec/RUN --new-items arrivals --output new-users.jsonl": "",
    "python -m apps.clcrec export vectors.safetensors --run runs/clcrec/RUN": "",
    "python -m apps.clcrec bench --quick": f"{QUICK_SPEED} --only construction",  # its folder becomes the newest RUN
    "python -m apps.clcrec diagnose": QUICK_SPEED,
    "python -m apps.clcrec tune-speed": QUICK_SPEED,
    "python -m apps.graphrec train": QUICK_ROWS,
    "python -m apps.graphrec train --model bspm": "--filter-rank 8",
    "python -m apps.graphrec train --config default": QUICK_ROWS,
    "python -m apps.graphrec train --config fast": QUICK_ROWS,
    "python -m apps.graphrec train --data-path ratings.txt --name first": QUICK_FEW,
    "python -m apps.graphrec --data_path movielens --num_workers 8 --batch_size 512 --l_r 0.0014 --num_neg 512": (
        QUICK_FEW
    ),
    "python -m apps.graphrec check gowalla": "",
    "python -m apps.graphrec prepare gowalla gowalla.safetensors": "",
    "python -m apps.graphrec prepare ratings.txt ratings.safetensors --split time --min-rating 4": "",
    "python -m apps.graphrec train --config gowalla --data-path gowalla": QUICK_FEW,
    "python -m apps.graphrec train --config gowalla-filter --data-path gowalla": "",
    "python -m apps.graphrec train --config clcrec-graph --data-path Data/movielens": QUICK_FEW,
    "python -m apps.graphrec train --config balanced --data-path Data/movielens": QUICK_FEW,
    "python -m apps.graphrec train --config turbo --data-path Data/movielens": QUICK_FEW,
    "python -m apps.graphrec train --config quality --data-path Data/movielens": QUICK_FEW,
    "python -m torch.distributed.run --standalone --nproc-per-node 2 -m apps.graphrec train --data-path gowalla": (
        QUICK_FEW
    ),
    "python -m apps.graphrec train --resume runs/graphrec/RUN": "",
    "python -m apps.graphrec evaluate runs/graphrec/RUN": "",
    "python -m apps.graphrec predict runs/graphrec/RUN --k 20 --output top20.jsonl": "",
    "python -m apps.graphrec export vectors.safetensors --run runs/graphrec/RUN": "",
    "python -m apps.graphrec bench --quick": f"{QUICK_SPEED} --only propagation",  # its folder becomes the newest RUN
    "python -m apps.graphrec diagnose": QUICK_SPEED,
    "python -m apps.graphrec tune-speed": QUICK_SPEED,
    "python -m apps.reid check ORBench": "",
    "python -m apps.reid prepare ORBench orbench.safetensors": "",
    (
        "python -m apps.reid train --config vit-b16 --data-path orbench.safetensors --init clip.safetensors "
        "--vocab bpe_simple_vocab_16e6.txt.gz"
    ): QUICK_CLIP,
    "python -m apps.reid train --config market --data-path Market-1501": QUICK_PAIR,
    "python -m apps.reid prepare runs/orl-faces/table.csv runs/orl-faces.safetensors --height 56 --width 48": "",
    "python -m apps.reid train --config faces --data-path runs/orl-faces.safetensors": f"{QUICK_PAIR} --patch 8",
    "python -m apps.reid train --windows": QUICK_PEOPLE,
    "python -m apps.reid train --config default": QUICK_PEOPLE,
    "python -m apps.reid train --config notes": QUICK_PEOPLE,
    "python -m apps.reid train --data-path orbench.safetensors --name first": QUICK_PAIR,
    "python -m apps.reid train --resume runs/reid/RUN": "",
    "python -m apps.reid evaluate runs/reid/RUN": "",
    "python -m apps.reid evaluate runs/reid/RUN --rerank": "",
    "python -m apps.reid predict runs/reid/RUN --list NIR+SK --output ranking.csv --sheet ranking.html": "",
    "python -m apps.reid export features.safetensors --run runs/reid/RUN": "",
    "python -m apps.reid bench --quick": f"{QUICK_PEOPLE} --budget 0 --only sampling",  # as there
    "python -m apps.reid diagnose": f"{QUICK_PEOPLE} --budget 0",
    "python -m apps.reid tune-speed": f"{QUICK_PEOPLE} --budget 0",
}

# Command that is not run here, and why. Installing and running pytest need no entry.
NOT_RUN = {
    "python tests/test_siblings.py": "it writes into the checkout",
    "python -m benchmarks.contest_step --folder contest": "a measurement, for a quiet machine",
}


def pairs_text(num_users: int, num_items: int) -> str:
    """A small source of events: user u meets u + 4 items, one after the other."""
    rows = [(user, (user * 7 + i * 3) % num_items + 1) for user in range(1, num_users + 1) for i in range(user % 5 + 4)]
    return "".join(f"{user} {item}\n" for user, item in rows)


def lines_text(num_users: int, num_items: int) -> str:
    """The same, one user per line."""
    rows = [[(user * 7 + i * 3) % num_items + 1 for i in range(user % 5 + 4)] for user in range(1, num_users + 1)]
    return "".join(f"{user} {' '.join(map(str, items))}\n" for user, items in enumerate(rows, start=1))


def ratings_text(num_users: int, num_items: int) -> str:
    """MovieLens' ratings of the same events."""
    rows = [(user, (user * 7 + i * 3) % num_items + 1) for user in range(1, num_users + 1) for i in range(user % 5 + 4)]
    return "".join(f"{user}::{item}::{user * item % 5 + 1}::978300760\n" for user, item in rows)


def movies_text(num_items: int) -> str:
    genres = ("Drama", "Comedy", "Drama|Horror")
    return "".join(f"{item}::Film {item} (1999)::{genres[item % 3]}\n" for item in range(1, num_items + 1))


def rated_text(num_users: int, num_items: int) -> str:
    """The same as `user item rating time`."""
    rows = [line.split("::") for line in ratings_text(num_users, num_items).splitlines()]
    return "".join(f"{user} {item} {rating} {time}\n" for user, item, rating, time in rows)


def part_text(num_users: int, num_items: int, *, is_test: bool) -> str:
    """LightGCN's train.txt of the same events, or its test.txt: each user's last one."""
    rows = [line.split() for line in lines_text(num_users, num_items).splitlines()]
    parts = [[int(word) - 1 for word in ([row[0], row[-1]] if is_test else row[:-1])] for row in rows]
    return "".join(" ".join(map(str, part)) + "\n" for part in parts)


# Data files that the commands name, small.
INPUTS = {
    "ml-1m.txt": pairs_text(60, 40),
    "Beauty.txt": lines_text(60, 40),
    "ml-1m/ratings.dat": ratings_text(60, 40),
    "ml-1m/movies.dat": movies_text(40),
    "ratings.txt": rated_text(60, 40),
    "gowalla/train.txt": part_text(60, 40, is_test=False),
    "gowalla/test.txt": part_text(60, 40, is_test=True),
}
# And folders in CLCRec's layout.
FOLDERS = ("Data/movielens", "Data/citeulike", "arrivals")


def write_people(folder: Path) -> None:
    """Folders of images in ORBench's layout and in Market-1501's, and a table of the latter's."""
    with mock.patch.multiple(reid_demo, NUM_TRAIN=3, NUM_TEST=2):
        reid_demo.write_demo(folder / "ORBench")
    rows = ["path,identity,camera,split"]
    for number, image in enumerate(sorted((folder / "ORBench/vis").rglob("*.png"))):
        person, camera = image.name[:4], number % 2 + 1
        part = "train" if person <= "0003" else "query" if number % 5 == 0 else "gallery"
        place = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}[part]
        target = folder / "Market-1501" / place / f"{person}_c{camera}s1_{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(image.read_bytes())
        copy = folder / "runs/orl-faces" / target.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(image.read_bytes())
        rows.append(f"{copy.name},{person},{camera},{part}")
    (folder / "runs/orl-faces/table.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


# Reading the pages


def commands_in(markdown: str) -> list[str]:
    """The commands of all bash blocks: one per line or `&&`, continued lines joined, comments left out."""
    found = []
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", markdown, flags=re.MULTILINE | re.DOTALL):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            text = re.sub(r"(^|\s)#.*", "", line)
            found += [" ".join(part.split()) for part in text.split("&&") if part.strip()]
    return found


def hidden_blocks(markdown: str) -> list[str]:
    """Names of code blocks whose commands nobody would look for."""
    return re.findall(r"^ *```(sh|shell|console|zsh|terminal|shell-session)\b", markdown, flags=re.MULTILINE)


def fault_of(command: str, root: Path = ROOT) -> str | None:
    """What is wrong with a documented command; None where it is run here, or needs no run and names what exists."""
    words = shlex.split(command)
    if words[:2] == ["pip", "install"] or words[:4] == ["python", "-m", "pip", "install"]:
        return _fault_of_install(words[words.index("install") + 1 :], root)
    if words[:3] == ["python", "-m", "pytest"]:
        absent = [word for word in words[3:] if not word.startswith("-") and not (root / word.split("::")[0]).exists()]
        return f"`{command}` names {', '.join(absent)}, which is not there" if absent else None
    if command in TESTED or command in NOT_RUN:
        return None
    return f"`{command}` is not tested; add it to TESTED in tests/test_readme.py with flags that make it short"


def _fault_of_install(words: Sequence[str], root: Path) -> str | None:
    """What a documented `pip install` names that does not exist; it may install requirement files and this project."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word in ("-r", "--requirement"):
            name = rest.pop(0) if rest else ""
            if not name or not (root / name).is_file():
                return f"pip installs {name or 'nothing'}, but there is no such requirement file"
        elif match := re.fullmatch(r"\.(?:\[([a-z,-]+)\])?", word):
            known = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            extras = set(match[1].split(",")) if match[1] else set()
            absent = extras - set(known.get("optional-dependencies", {}))
            if absent:
                return f"pip installs the extra {', '.join(sorted(absent))}, which pyproject.toml does not have"
        elif word not in ("-e", "--editable", "--upgrade", "-U"):
            return f"pip installs {word}; documented commands install requirement files or this project"
    return None


# Running commands


def words_to_run(command: str, flags: str = "") -> list[str]:
    """The words of a command with its shortening flags, RUN replaced by the newest run folder of the app named."""
    words = shlex.split(command) + shlex.split(flags)
    return [re.sub(r"^(.*)/RUN(?=/|$)", lambda match: str(_newest(Path(match[1]))), word) for word in words]


def _newest(folder: Path) -> Path:
    runs = sorted(path for path in folder.glob("[0-9]*-*") if path.is_dir()) if folder.is_dir() else []
    return runs[-1] if runs else folder / "RUN"


def run_all(commands: Sequence[tuple[str, str]]) -> list[int]:
    """Exit codes of (command, flags) run in this process one after the other; "python" alone is understood."""
    codes = []
    for number, (command, flags) in enumerate(commands):
        print(f"\0{number}", flush=True)  # begins what this command prints
        codes.append(_run(words_to_run(command, flags)))
        sys.stdout.flush()
        sys.stderr.flush()
    return codes


def _run(words: Sequence[str]) -> int:
    assert words[0] == "python", f"only python commands can be run here, not {words[0]}"
    is_module = words[1] == "-m"
    sys.argv = list(words[2:] if is_module else words[1:])
    try:
        with contextlib.redirect_stderr(sys.stdout):
            if is_module:
                runpy.run_module(words[2], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(words[1], run_name="__main__")
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else 0 if stopped.code is None else 1
    except Exception:  # noqa: BLE001 - whatever it is, it is this command's result, and the next one is to run
        traceback.print_exc(file=sys.stdout)
        return 1
    return 0


def run_in_one_process(commands: Sequence[tuple[str, str]], folder: Path) -> list[tuple[int, str]]:
    """Exit code and output of each command, run in a new process in `folder`."""
    environment = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "PYTHONSTARTUP")}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "NO_COLOR": "1", "COLUMNS": "150"}
    codes = folder / "codes.json"
    done = subprocess.run(
        [sys.executable, __file__, str(codes)],
        cwd=folder,
        env=environment,
        input=json.dumps(list(commands)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    outputs = re.split(r"\0\d+\n", done.stdout)[1:]
    return list(zip(json.loads(codes.read_text(encoding="utf-8")), outputs, strict=True))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and output of every command of TESTED."""
    folder = tmp_path_factory.mktemp("readme")
    for name, text in INPUTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    write_contest(folder / "contest", num_users=30, num_items=40, mean_length=10, seed=1)
    small = demo.demo_data(num_users=40, num_warm=30, num_cold=10)
    with mock.patch.object(demo, "demo_data", return_value=small):
        for name in FOLDERS:
            demo.write_demo(folder / name)
    write_people(folder)
    return dict(zip(TESTED, run_in_one_process(list(TESTED.items()), folder), strict=True))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_the_page_is_tested(page: Path):
    text = page.read_text(encoding="utf-8")
    assert [fault for command in commands_in(text) if (fault := fault_of(command))] == []
    assert hidden_blocks(text) == [], "write ```bash, which is where commands are looked for"


@pytest.mark.parametrize("command", TESTED)
def test_documented_command_runs(command: str, results: dict[str, tuple[int, str]]):
    code, output = results[command]
    assert code == 0, output


def test_no_command_is_left_over():
    shown = {command for page in PAGES if page.is_file() for command in commands_in(page.read_text(encoding="utf-8"))}
    assert sorted({*TESTED, *NOT_RUN} - shown) == [], "no page shows these; take them out of the tables"


def test_only_what_cannot_be_run_is_left_out():
    assert [command for command in NOT_RUN if re.search(r"\bapps\.", command)] == []


# The checks themselves


def test_commands_are_read_from_bash_blocks():
    page = (
        "`python inline`\n```python\npython = 1\n```\n"
        "```bash\npip install -r a.txt && python -m b   # why\n# only a comment\n\npython -m c \\\n    --d 1\n```\n"
        "1. list\n   ```bash\n   python -m e '#f'\n   ```\n"
    )
    assert commands_in(page) == ["pip install -r a.txt", "python -m b", "python -m c --d 1", "python -m e '#f'"]


def test_other_shell_blocks_are_noticed():
    assert hidden_blocks("```bash\na\n```\n```console\n$ b\n```\n```sh\nc\n```\n```python\n```\n") == ["console", "sh"]


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("python -m apps.seqrec train --brand-new", "not tested"),
        ("rm -rf runs", "not tested"),
        ("pip install -r requirements-none.txt", "no such requirement file"),
        ("pip install -e .[none]", "the extra none"),
        ("pip install torch", "pip installs torch"),
        ("python -m pytest tests/nothing", "tests/nothing"),
    ],
)
def test_undocumented_and_wrong_commands_are_named(command: str, fault: str):
    assert fault in (fault_of(command) or "")


@pytest.mark.parametrize(
    "command",
    [
        next(iter(TESTED)),
        next(iter(NOT_RUN)),
        "pip install -r requirements.txt",
        "python -m pip install -r requirements-dev.txt",
        "pip install -e .",
        "pip install -e '.[formats,board]'",
        "python -m pytest",
        "python -m pytest -x tests/test_readme.py::test_only_what_cannot_be_run_is_left_out",
    ],
)
def test_commands_of_the_tables_and_installs_are_accepted(command: str):
    assert fault_of(command) is None


def test_run_stands_for_the_newest_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("20260101-000000-run", "20260102-000000-demo-run", "demo-data"):
        (tmp_path / "runs/a" / name).mkdir(parents=True)
    words = words_to_run("python -m apps.a evaluate runs/a/RUN/checkpoints RUN", "--RUN 1")
    assert Path(words[4]) == Path("runs/a/20260102-000000-demo-run/checkpoints")
    assert words[5:] == ["RUN", "--RUN", "1"]
    assert words_to_run("python runs/b/RUN")[1] == str(Path("runs/b/RUN"))


def test_commands_run_in_one_process_and_report_their_own_end(tmp_path: Path):
    (tmp_path / "good.py").write_text(
        "import os, sys; print('argv', sys.argv[1:]); open('pid', 'a').write(f'{os.getpid()} ')"
    )
    (tmp_path / "leave.py").write_text("import sys; print('leaving', file=sys.stderr); sys.exit(3)")
    (tmp_path / "fail.py").write_text("raise KeyError('lost')")
    commands = [("python good.py", "--x 1"), ("python leave.py", ""), ("python fail.py", ""), ("python good.py", "")]
    (first, second, third, fourth) = run_in_one_process(commands, tmp_path)
    assert first == (0, "argv ['--x', '1']\n")
    assert second == (3, "leaving\n")
    assert third[0] == 1
    assert "KeyError: 'lost'" in third[1]
    assert fourth == (0, "argv []\n")
    assert len(set((tmp_path / "pid").read_text().split())) == 1


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(run_all(json.load(sys.stdin))), encoding="utf-8")
