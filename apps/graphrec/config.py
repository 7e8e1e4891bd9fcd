"""Every knob of graphrec: type, default and one sentence; flags, help and YAML keys are views of these fields."""

from dataclasses import dataclass, field

from shared.config import knob


@dataclass(frozen=True)
class DataConfig:
    data_path: str | None = knob(
        None, "Folder or file with interactions, or a pack made by `prepare`; none: demo data."
    )
    format: str = knob(
        "auto",
        "How to read it; auto looks at the files.",
        choices=("auto", "lightgcn", "clcrec", "inter", "text", "pack"),
    )
    split: str = knob(
        "random",
        "How a source without a test part is divided: each user's items at random, or the latest ones (time).",
        choices=("random", "time"),
    )
    valid_share: float = knob(
        0.1,
        "Share of each user's training items held out for validation where the source has none; 0 holds out none.",
        minimum=0.0,
        below=1.0,
    )
    min_rating: float | None = knob(None, "Lowest rating that counts as an interaction; none: every line counts.")
    has_v: bool = knob(False, "Use the visual features; when none of the three is asked for, all that exist are used.")
    has_a: bool = knob(False, "Use the acoustic features (feat_a); see --has-v.")
    has_t: bool = knob(False, "Use the textual features (feat_t); see --has-v.")


@dataclass(frozen=True)
class ModelConfig:
    model: str = knob(
        "lightgcn",
        "Where vectors or scores come from; gfcf and bspm are filters of the graph that need no training.",
        choices=("mf", "lightgcn", "simgcl", "xsimgcl", "content", "clcrec-graph", "gfcf", "bspm"),
    )
    embed_dim: int = knob(64, "Width of all embeddings.", minimum=1)
    layers: int = knob(3, "Propagations over the graph (lightgcn, simgcl, xsimgcl); 0 is mf.", minimum=0)
    combine: str = knob(
        "mean", "Final vectors: the mean of all layers, or the last alone (lightgcn).", choices=("mean", "last")
    )
    hidden_dim: int = knob(256, "Width of the content encoder's hidden layer (content, clcrec-graph).", minimum=1)
    score: str = knob("dot", "Score of an item in the losses: dot product, or cosine.", choices=("dot", "cosine"))
    rank_by: str = knob(
        "score",
        "What items are ranked by: the score of the losses, or the dot product, in which lengths count.",
        choices=("score", "dot"),
    )
    noise_eps: float = knob(0.1, "Length of the noise added to every layer (simgcl, xsimgcl).", minimum=0.0)
    contrast_layer: int = knob(1, "Layer that xsimgcl contrasts with the final vectors.", minimum=1)
    init: str = knob(
        "normal",
        "First embeddings: normal, xavier (both random), or spectral: the graph's leading singular vectors.",
        choices=("normal", "xavier", "spectral"),
    )
    init_scale: float = knob(0.1, "Root mean square of normal and spectral first embeddings.", above=0.0)
    bf16_rows: bool = knob(False, "Propagate rows rounded to bfloat16: about half the memory traffic of a product.")
    filter_rank: int = knob(256, "Singular vectors of the low-pass part (gfcf, bspm).", minimum=1)
    filter_iterations: int = knob(3, "Block iterations that find the singular vectors.", minimum=1)
    filter_alpha: float = knob(0.3, "Weight of the low-pass part in gfcf.", minimum=0.0)
    filter_beta: float = knob(0.2, "Weight of the low-pass part in bspm.", minimum=0.0)
    filter_step: float = knob(2.5, "How far bspm sharpens: the step of its one Runge-Kutta step.", minimum=0.0)


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = knob(50, "Passes over the training pairs.", minimum=1)
    batch_size: int = knob(2048, "Pairs per batch.", minimum=1)
    accumulate: int = knob(
        1, "Micro-batches a batch is split into: less memory, the same result for losses of pairs.", minimum=1
    )
    propagate_every: int = knob(
        1,
        "Batches for each propagation: their gradients are added up, one optimizer step applies their mean.",
        minimum=1,
    )
    loss: str = knob(
        "auto",
        "bpr, softmax (over sampled negatives), inbatch, directau, or clcrec; auto: clcrec for clcrec-graph, "
        "else softmax.",
        choices=("auto", "bpr", "softmax", "inbatch", "directau", "clcrec"),
    )
    num_negatives: int = knob(
        0,
        "Negatives per pair; with --negatives shared, per batch; 0: 1 for bpr, 128 for clcrec, 512 for softmax.",
        minimum=0,
    )
    negatives: str = knob(
        "auto",
        "shared (by a batch) or device (fresh and exact for every pair); auto: shared for softmax, else device.",
        choices=("auto", "shared", "device"),
    )
    neg_exclude: str = knob(
        "train",
        "Positives that are never drawn as negatives: train, or all (leaks held-out pairs).",
        choices=("train", "all"),
    )
    temperature: float = knob(
        1.0, "What scores are divided by in the losses bpr, softmax, inbatch and clcrec.", minimum=1e-4
    )
    logq: bool = knob(True, "Correct in-batch logits by the log of each item's share of the training pairs.")
    gamma: float = knob(1.0, "Weight of uniformity in directau.", minimum=0.0)
    reg_weight: float = knob(
        1e-4,
        "Weight of half the mean square norm of a batch's unpropagated rows; in clcrec, of their mean norm.",
        minimum=0.0,
    )
    contrast_weight: float = knob(0.2, "Weight of the contrast between views (simgcl, xsimgcl).", minimum=0.0)
    contrast_temperature: float = knob(0.2, "Temperature of that contrast.", minimum=1e-4)
    contrast_nodes: int = knob(1024, "Most users, and most items, of a batch in that contrast; 0 takes all.", minimum=0)
    lr_lambda: float = knob(
        0.5,
        "clcrec: weight of the item-content loss; the user-item loss has the rest.",
        minimum=0.0,
        maximum=1.0,
    )
    num_sample: float = knob(
        0.5,
        "clcrec: share of item embeddings replaced by content in the user-item loss.",
        minimum=0.0,
        maximum=1.0,
    )
    graph_lambda: float = knob(0.1, "clcrec-graph: weight of the graph contrast of users.", minimum=0.0)
    graph_temp: float = knob(0.2, "clcrec-graph: temperature of the graph contrast.", minimum=1e-4)
    graph_view: str = knob(
        "fast",
        "clcrec-graph: user against the mean of its items (fast), or that mean against that of co-occurring users "
        "(full).",
        choices=("fast", "full"),
    )
    optimizer: str = knob("adam", "adam or adamw, fused.", choices=("adam", "adamw"))
    lr: float = knob(5e-3, "Peak learning rate.", minimum=0.0)
    lr_scale: str = knob(
        "none",
        "sqrt multiplies the learning rate by sqrt(batch_size / 256), so that --lr is that of batches of 256.",
        choices=("none", "sqrt"),
    )
    weight_decay: float = knob(0.0, "Decoupled weight decay (adamw); L2 term under adam.", minimum=0.0)
    lr_scheduler: str = knob("constant", "Learning rate after warm-up.", choices=("constant", "cosine", "step"))
    warmup_steps: int = knob(0, "Linear warm-up (steps).", minimum=0)
    min_lr: float = knob(0.0, "Where cosine ends, as a share of the peak.", minimum=0.0, maximum=1.0)
    lr_step_epochs: int = knob(10, "Epochs between decays of the step schedule.", minimum=1)
    lr_gamma: float = knob(0.5, "Factor of each decay of the step schedule.", minimum=0.0, maximum=1.0)
    clip_norm: float = knob(0.0, "Largest gradient norm; 0 does not clip.", minimum=0.0)
    ema_decay: float = knob(
        0.0, "Decay per step of averaged weights used for evaluation; 0 keeps none.", minimum=0.0, maximum=1.0
    )
    seed: int = knob(42, "Seed of everything drawn.", minimum=0)
    precision: str = knob(
        "auto", "fp32, bf16, fp16, or auto: what this hardware is built for.", choices=("auto", "fp32", "bf16", "fp16")
    )
    device: str = knob("auto", "auto, cpu, cuda or cuda:N.")
    kernel: str = knob(
        "auto",
        "Kernel of the sparse product: auto (bag on a CPU, a timed probe on CUDA), bag or csr.",
        choices=("auto", "bag", "csr"),
    )
    parallel: str = knob(
        "data",
        "What several processes divide: the pairs of a step (data), or the embedding columns (dims).",
        choices=("data", "dims"),
    )
    compile: str = knob(
        "off",
        "Mode of torch.compile; no gain on a CPU.",
        choices=("off", "default", "reduce-overhead", "max-autotune"),
    )
    deterministic: bool = knob(False, "Only deterministic kernels, an error where there is none; slower on CUDA.")
    num_workers: int = knob(
        0, "Accepted and left unused: batches are made from tensors in this process, workers only cost.", minimum=0
    )
    select: str = knob(
        "Recall", "Validation metric that picks the best checkpoint and stops early; without @k at the largest k."
    )
    ks: tuple[int, ...] = knob((20,), "Cut-offs of the ranking metrics.")
    baselines: str = knob(
        "all",
        "Rows below the model in the result table: popularity and the filter gfcf, or popularity alone.",
        choices=("all", "popularity"),
    )
    eval_every: int = knob(1, "Epochs between validations.", minimum=1)
    patience: int = knob(10, "Validations without improvement before stopping early; 0 never stops early.", minimum=0)
    log_every: int = knob(50, "Steps between lines of metrics.jsonl.", minimum=1)
    norm_every: int = knob(200, "Steps between records of the gradient norm; 0 records none.", minimum=0)
    save_every: int = knob(0, "Steps between checkpoints; 0 saves at the end of each epoch.", minimum=0)
    keep: int = knob(2, "Most recent checkpoints kept beside the best.", minimum=1)
    max_steps: int = knob(0, "Stop after so many optimizer steps; 0 runs all epochs.", minimum=0)
    memory_mib: int = knob(32, "Memory for a chunk of scores in evaluation and prediction (MiB).", minimum=1)
    tensorboard: bool = knob(False, "Also write TensorBoard event files (needs the extra `board`).")


@dataclass(frozen=True)
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainConfig = field(default_factory=TrainConfig)


# spellings of the original scripts (CLCRec, LightGCN-PyTorch) -> ours; in flags (--num-epochs) and YAML (num_epochs)
ALIASES = {
    "num_epoch": "epochs",
    "num_epochs": "epochs",
    "l_r": "lr",
    "learning_rate": "lr",
    "num_neg": "num_negatives",
    "temp_value": "temperature",
    "dim_E": "embed_dim",
    "dim_e": "embed_dim",
    "recdim": "embed_dim",
    "layer": "layers",
    "decay": "reg_weight",
    "bpr_batch": "batch_size",
    "graph_temperature": "graph_temp",
    "accumulation_steps": "accumulate",
    "data_dir": "data_path",
    "topK": "ks",
    "topk": "ks",
    "topks": "ks",
}
