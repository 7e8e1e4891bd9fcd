"""Train and test one model with RecBole, and print what was measured as a line of JSON.

Started by compare.py with the interpreter of RecBole's own virtual environment, in a folder that RecBole may write to.
The one argument is the job as JSON: compare.py's Job. Nothing of the project is imported here.
"""

import hashlib
import json
import platform
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch
from recbole.config import Config  # type: ignore[import-not-found]
from recbole.data import create_dataset, data_preparation  # type: ignore[import-not-found]
from recbole.utils import get_model, get_trainer, init_seed  # type: ignore[import-not-found]

PACKAGES = ("recbole", "torch", "numpy", "scipy", "pandas")


def settings(job: Mapping[str, Any]) -> dict[str, Any]:
    """The job in RecBole's words; what is not named here is its default."""
    common = {
        "data_path": job["folder"],
        "seed": job["seed"],
        "epochs": job["epochs"],
        "train_batch_size": job["batch_size"],
        "learning_rate": job["lr"],
        "n_layers": job["layers"],
        "metrics": ["Recall", "NDCG"],
        "topk": [job["k"]],
        "valid_metric": f"NDCG@{job['k']}",
        "metric_decimal_place": 8,
        "use_gpu": False,
        "show_progress": False,
    }
    if job["model"] == "SASRec":
        return common | {
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "MAX_ITEM_LIST_LENGTH": job["max_len"],
            "hidden_size": job["embed_dim"],
            "n_heads": job["heads"],
            "inner_size": 4 * job["embed_dim"],
            "hidden_act": "gelu",
            "hidden_dropout_prob": job["dropout"],
            "attn_dropout_prob": 0.0,  # ours has none there
            "loss_type": "CE",
            "train_neg_sample_args": None,
            "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
            "eval_batch_size": job["eval_users"],
        }
    return common | {
        "load_col": {"inter": ["user_id", "item_id"]},
        "benchmark_filename": ["train", "valid", "test"],
        "embedding_size": job["embed_dim"],
        "reg_weight": job["reg_weight"],
        "require_pow": True,  # half the mean square norm, as in the paper and in ours
        "train_neg_sample_args": {
            "distribution": "uniform",
            "sample_num": 1,
            "alpha": 1.0,
            "dynamic": False,
            "candidate_num": 0,
        },
        "eval_args": {"group_by": "user", "order": "RO", "mode": "full"},
        "eval_batch_size": job["eval_users"] * (job["num_items"] + 1),  # counted in scores
    }


def part_of(loader: Any) -> list[Any]:
    """How many targets a part holds, and a digest of who has which as a target."""
    dataset = loader.dataset
    columns = (dataset.inter_feat[field].numpy() for field in (dataset.uid_field, dataset.iid_field))
    users, items = (
        dataset.id2token(field, column)
        for field, column in zip((dataset.uid_field, dataset.iid_field), columns, strict=True)
    )
    lines = sorted(f"{user} {item}" for user, item in zip(users, items, strict=True))
    return [len(lines), hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()]


def main() -> None:
    """Print the line."""
    job = json.loads(sys.argv[1])
    del sys.argv[1:]  # RecBole looks there for settings
    config = Config(model=job["model"], dataset=job["dataset"], config_dict=settings(job))
    init_seed(config["seed"], config["reproducibility"])
    begin = time.perf_counter()
    dataset = create_dataset(config)
    train_data, valid_data, test_data = data_preparation(config, dataset)
    reading_s = time.perf_counter() - begin
    init_seed(config["seed"], config["reproducibility"])
    model = get_model(config["model"])(config, train_data.dataset).to(config["device"])
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)

    def train(first: int, end: int) -> float:
        """Seconds of the epochs first .. end - 1."""
        trainer.start_epoch, trainer.epochs = first, end
        begin = time.perf_counter()
        trainer.fit(train_data, verbose=False, saved=False)
        return time.perf_counter() - begin

    train(0, job["warm_up"])
    trainer.evaluate(valid_data, load_best_model=False)  # the first one is slower on both sides
    training_s = train(job["warm_up"], job["epochs"])
    begin = time.perf_counter()
    found = trainer.evaluate(test_data, load_best_model=False)
    evaluation_s = time.perf_counter() - begin
    result = {
        "reading_s": reading_s,
        "epoch_s": training_s / (job["epochs"] - job["warm_up"]),
        "evaluation_s": evaluation_s,
        "steps": len(train_data),
        "NDCG": float(found[f"ndcg@{job['k']}"]),
        "Recall": float(found[f"recall@{job['k']}"]),
        "users": dataset.user_num - 1,
        "items": dataset.item_num - 1,
        "parts": [part_of(loader) for loader in (train_data, valid_data, test_data)],
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES},
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
