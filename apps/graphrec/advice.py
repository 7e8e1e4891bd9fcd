"""Sentences about a run: what has no effect, what needs care, what it takes, and what it should be compared with."""

from collections.abc import Mapping

from apps.graphrec.config import Config
from apps.graphrec.graph import graph_bytes
from apps.graphrec.model import ENCODED, FILTERS, NOISY, PROPAGATED

SMALL_STEP = 2048  # pairs: below it the propagation takes most of a step

# knobs that act in some models or losses alone
OF_MODELS = {
    "model": {
        "layers": PROPAGATED,
        "combine": ("lightgcn",),
        "bf16_rows": PROPAGATED,
        "noise_eps": NOISY,
        "contrast_layer": ("xsimgcl",),
        "hidden_dim": ENCODED,
        "filter_beta": ("bspm",),
        "filter_step": ("bspm",),
    },
    "training": {
        "contrast_weight": NOISY,
        "contrast_temperature": NOISY,
        "contrast_nodes": NOISY,
        "lr_lambda": ("clcrec-graph",),
        "num_sample": ("clcrec-graph",),
        "graph_lambda": ("clcrec-graph",),
        "graph_temp": ("clcrec-graph",),
        "graph_view": ("clcrec-graph",),
    },
}
OF_LOSSES = {
    "num_negatives": ("bpr", "softmax", "clcrec"),
    "negatives": ("bpr", "softmax", "clcrec"),
    "temperature": ("bpr", "softmax", "inbatch", "clcrec"),
    "logq": ("inbatch",),
    "gamma": ("directau",),
}


def without_effect(config: Config, *, loss: str, precision: str) -> list[str]:
    """One sentence for each setting that was asked for and does nothing, or less than one may think.

    `loss` and `precision` are those that "auto" became.
    """
    model, training = config.model, config.training
    lines = []
    if training.num_workers:
        lines.append(
            f"--num-workers {training.num_workers} is not used: a loader would get min(cores, 8), but batches are made "
            "from tensors in this process, where workers would only cost"
        )
    if model.model in FILTERS:
        return [
            *lines,
            f"{model.model} is a filter of the graph: it takes no training steps, so their options do nothing",
        ]
    for section, knobs in OF_MODELS.items():
        part = getattr(config, section)
        for name, models in knobs.items():
            if model.model not in models and getattr(part, name) != getattr(type(part)(), name):
                lines.append(f"{_flag(name)} is about {', '.join(models)}, and changes nothing in {model.model}")
    for name, its_losses in OF_LOSSES.items():
        if loss not in its_losses and getattr(training, name) != getattr(type(training)(), name):
            lines.append(f"{_flag(name)} is about the losses {', '.join(its_losses)}, and changes nothing in {loss}")
    if precision != "fp32":
        acts = "the products of scores" + (" and the content encoder" if model.model in ENCODED else "")
        lines.append(
            f"{precision} acts on {acts} alone: embeddings, optimizer and sums are fp32, and so is the propagation "
            "(--bf16-rows rounds its rows)"
        )
    if model.model in PROPAGATED and training.batch_size * training.propagate_every < SMALL_STEP:
        lines.append(
            f"a propagation costs the same for any number of pairs: with {training.batch_size} a step, nearly all of "
            "the time goes there; raise --batch-size, or --propagate-every"
        )
    return lines


def warnings(config: Config) -> list[str]:
    """What is likely to be a mistake."""
    training = config.training
    if config.model.model == "clcrec-graph" and training.lr_lambda in (0.0, 1.0):
        loss = "user-item" if training.lr_lambda else "item-content"
        return [
            f"lr_lambda {training.lr_lambda:g} multiplies the {loss} loss by zero, so that nothing learns from it; "
            "use a value between 0 and 1, as --lr-lambda 0.5"
        ]
    return []


def memory_text(config: Config, *, num_users: int, num_items: int, num_pairs: int, weights: int) -> str:
    """What training takes, by formula: the weights with gradient, Adam and average; the graph and a propagation."""
    copies = 4 + (config.training.ema_decay > 0)  # weights, gradient, two moments, average
    graph = graph_bytes(num_users=num_users, num_items=num_items, num_pairs=num_pairs, dim=config.model.embed_dim)
    return (
        f"memory: {copies} x {weights:,} weights x 4 bytes = {copies * weights * 4 / 1e6:,.0f} MB, "
        f"graph and propagation {graph / 1e6:,.0f} MB"
    )


def behind_filter(config: Config, metrics: Mapping[str, float], others: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A warning, where the model is behind the filter that needs no training by validation recall."""
    name = next((key for key in metrics if key.rpartition("/")[2] == f"Recall@{max(config.training.ks)}"), None)
    if name is None or "gfcf" not in others or metrics[name] >= others["gfcf"][name]:
        return []
    return [
        f"WARNING: {config.model.model} reaches validation {name} {metrics[name]:.4f}, less than the "
        f"{others['gfcf'][name]:.4f} of gfcf, which needs no training: train longer, change the recipe, or use "
        "--model gfcf or bspm"
    ]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
