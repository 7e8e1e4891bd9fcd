"""Every knob of clcrec: type, default and one sentence; flags, help and YAML keys are views of these fields."""

from dataclasses import dataclass, field

from shared.config import knob


@dataclass(frozen=True)
class DataConfig:
    data_path: str | None = knob(None, "Folder in the original's layout, or a pack made by `prepare`; none: demo data.")
    has_v: bool = knob(False, "Use the visual features; when none of the three is asked for, all that exist are used.")
    has_a: bool = knob(False, "Use the acoustic features (feat_a); see --has-v.")
    has_t: bool = knob(False, "Use the textual features (feat_t); see --has-v.")


@dataclass(frozen=True)
class ModelConfig:
    embed_dim: int = knob(64, "Width of user, item and content embeddings.", minimum=1)
    hidden_dim: int = knob(256, "Width of the content encoder's hidden layer.", minimum=1)
    word_dim: int = knob(128, "Width of learned word vectors, where the text features are word lists.", minimum=1)


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = knob(50, "Passes over the training pairs.", minimum=1)
    batch_size: int = knob(256, "Pairs per optimizer step.", minimum=1)
    accumulate: int = knob(1, "Micro-batches a step is split into: less memory, the same result.", minimum=1)
    num_negatives: int = knob(128, "Negatives per pair; with --negatives shared, per step.", minimum=1)
    negatives: str = knob(
        "device",
        "device (fresh and exact for every pair), pool (drawn ahead, see --resample-epochs), or shared (by a step).",
        choices=("device", "pool", "shared"),
    )
    resample_epochs: int = knob(5, "Epochs a pool of negatives is used for; 0 draws it once.", minimum=0)
    neg_exclude: str = knob(
        "train",
        "Positives that are never drawn as negatives: train, or all (the original's: leaks held-out pairs).",
        choices=("train", "all"),
    )
    neg_power: float = knob(
        0.0, "Negatives are drawn by popularity to this power; 0 is uniform.", minimum=0.0, maximum=2.0
    )
    lr_lambda: float = knob(
        0.5, "Weight of the item-content loss; the user-item loss has the rest.", minimum=0.0, maximum=1.0
    )
    temperature: float = knob(0.2, "Temperature of both contrastive losses.", minimum=1e-4)
    reg_weight: float = knob(0.001, "Weight of the mean norm of the embeddings in a batch.", minimum=0.0)
    num_sample: float = knob(
        0.5, "Share of item embeddings replaced by content in the user-item loss.", minimum=0.0, maximum=1.0
    )
    replacement: str = knob(
        "bernoulli",
        "Positions replaced: each with that probability, or legacy (drawn with repeats, as the original).",
        choices=("bernoulli", "legacy"),
    )
    content_input: str = knob(
        "auto",
        "Items encoded in a step: all warm ones, the distinct ones of the batch, or the fewer of both.",
        choices=("auto", "warm", "batch"),
    )
    scores: str = knob(
        "auto",
        "How scores are made: one matrix product and a lookup, or gathered vectors; auto takes the cheaper.",
        choices=("auto", "matrix", "gather"),
    )
    optimizer: str = knob("adam", "adam or adamw, fused.", choices=("adam", "adamw"))
    lr: float = knob(1e-3, "Peak learning rate.", minimum=0.0)
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
    compile: str = knob(
        "off",
        "Mode of torch.compile; no gain on a CPU.",
        choices=("off", "default", "reduce-overhead", "max-autotune"),
    )
    cudnn_benchmark: bool = knob(False, "Let cuDNN time its kernels; this model has no convolution, so nothing gains.")
    deterministic: bool = knob(False, "Only deterministic kernels, an error where there is none; slower on CUDA.")
    num_workers: int = knob(
        0, "Accepted and left unused: batches are made from tensors in this process, workers only cost.", minimum=0
    )
    select: str = knob("all/Recall@10", "Validation metric that picks the best checkpoint and stops early.")
    ks: tuple[int, ...] = knob((10, 20), "Cut-offs of the ranking metrics.")
    mask_value: str = knob(
        "inf",
        "Score of items left out of a ranking: minus infinity, or the original's 1e-15 for parity.",
        choices=("inf", "legacy"),
    )
    cold_scale: float = knob(
        1.0, "Factor on cold items' scores where they are ranked among warm ones; choose it on validation.", above=0.0
    )
    eval_every: int = knob(1, "Epochs between validations.", minimum=1)
    patience: int = knob(7, "Validations without improvement before stopping early; 0 never stops early.", minimum=0)
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


# spellings of the original scripts -> ours; in flags (as --num-epochs) and in YAML (as num_epochs)
ALIASES = {
    "num_epoch": "epochs",
    "num_epochs": "epochs",
    "l_r": "lr",
    "learning_rate": "lr",
    "num_neg": "num_negatives",
    "temp_value": "temperature",
    "dim_E": "embed_dim",
    "dim_e": "embed_dim",
    "accumulation_steps": "accumulate",
    "data_dir": "data_path",
    "topK": "ks",
    "topk": "ks",
}
